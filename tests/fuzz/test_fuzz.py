"""Whatever a stranger's file holds, reading it ends, soon, with a value or with one line of ours.

`PUZZLE_FUZZ=10000` tries so many files of every kind, other ones every time; without it, a few and
always the same.
"""

import contextlib
import json
import os
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import make_parent, tiny_recipe
from faults import tally
from foreign import TEXTS, VALUES, damaged, files, mutated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import puzzle.api
import puzzle.assemble.measured
import puzzle.commands.measuring
import puzzle.engines.vllm_messages
import puzzle.evaluate.results
import puzzle.export.stage
import puzzle.library.records
import puzzle.score.results
import puzzle.search.answers
import puzzle.search.validate  # noqa: F401 (their records are among those that are tried)
from puzzle import config
from puzzle import settings as settings_files
from puzzle.artifacts import Record, read_records
from puzzle.cost import table as costs
from puzzle.data import sources, tasks
from puzzle.engines import roofline_engine
from puzzle.errors import UserError
from puzzle.locks import Holder
from puzzle.model import child, parent, weight_files
from puzzle.model.architecture import Architecture
from puzzle.search import constraints, published
from puzzle.search.table import Table

pytestmark = pytest.mark.training  # hundreds of files: a quarter of a minute
TRIES = int(os.environ.get("PUZZLE_FUZZ", "0"))
MOST_SECONDS, MOST_GROWTH_KIB = 5.0, 512 << 10
counts = Counter()
fuzz = settings(
    max_examples=TRIES or 50,
    derandomize=not TRIES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@contextlib.contextmanager
def survives():
    """Nothing but `UserError` comes out, in one line of bounded length, and in bounded time."""
    counts["tried"] += 1
    began = time.process_time()
    try:
        yield
    except UserError as error:
        text = str(error)
        assert 0 < len(text) < 4100 and "\n" not in text
    assert time.process_time() - began < MOST_SECONDS
    counts["survived"] += 1


@pytest.fixture(scope="module", autouse=True)
def bounded_and_counted():
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    tally("fuzz", counts["tried"], counts["survived"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < MOST_GROWTH_KIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A parent whose files are replaced by strangers'."""
    return make_parent(tmp_path_factory.mktemp("fuzz") / "parent")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module", autouse=True)
def untouched(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------- settings

RECIPE = tiny_recipe("parent", "text", "run") | {
    "places": {"a": {"deploy": ["vllm"]}},
    "children": {"b": {"place": "a", "search": {"memory": "50%"}}},
}


@fuzz
@given(st.one_of(files(RECIPE), st.text(max_size=200).map(str.encode)))
def test_recipes(scratch, data):
    path = scratch / "recipe.yaml"
    path.write_bytes(data)
    with survives():
        recipe = config.parse(settings_files.read_yaml(path), str(path))
        assert recipe.all_children() and recipe.all_places()
        constraints.check(recipe.search, {"main": recipe.cost.scenario} | recipe.cost.scenarios)


@fuzz
@given(mutated(RECIPE))
def test_recipes_as_mappings(recipe):
    with survives():
        again = config.parse(recipe)
        assert config.parse(again.model_dump(mode="json")) == again


YAML_SIGNS = st.text("ab:-[]{}&*!|>'\"#%@,?\n\t 01.~", max_size=60)


@fuzz
@given(st.one_of(YAML_SIGNS, st.text(max_size=60)))
def test_yaml(text):
    with survives(), contextlib.suppress(ValueError):
        value = settings_files.parse_yaml(text)
        assert len(repr(value)) < 10_000


@fuzz
@given(
    st.one_of(
        st.text(max_size=40),
        st.builds(
            "{}={}".format,
            st.sampled_from(["search.throughput", "library", "cost.scenario.batch_size", "a..b"]),
            st.one_of(YAML_SIGNS, VALUES.map(json.dumps)),
        ),
    )
)
def test_set(assignment):
    with survives():
        config.parse(RECIPE, "recipe", [assignment])


@fuzz
@given(
    st.sampled_from(sorted(constraints.KINDS)),
    st.text("0123456789.eExX%tok/sGgiBMKp ", max_size=12),
)
def test_quantities(name, text):
    with survives():
        asked = constraints.parse_quantity(name, text)
        assert 0 < asked.number < float("inf")


@fuzz
@given(TEXTS)
def test_names(name):
    with survives():
        config.check_name("child", name)
        assert "/" not in name and "\\" not in name and not name.startswith(".")
        assert Path("x", name).name == name


@fuzz
@given(files({"flops_per_s": 1e12, "bytes_per_s": 1e11, "step_overhead_s": 0.0}))
def test_device_sheets(scratch, data):
    path = scratch / "sheet.yaml"
    path.write_bytes(data)
    with survives():
        assert all(figure >= 0 for figure in roofline_engine.sheet(str(path)).values())


# ------------------------------------------------------------------------------------------ parents

CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "float32",
}
NAS = CONFIG | {
    "model_type": "nemotron-nas",
    "block_configs": [
        {
            "attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 2},
            "ffn": {"no_op": False, "replace_with_linear": False, "intermediate_size": 96},
        }
    ]
    * 4,
}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2"]


def configs():
    each = [files(CONFIG | {"model_type": family}) for family in FAMILIES]
    return st.one_of(*each, files(NAS))


@fuzz
@given(configs())
def test_configs(folder, untouched, data):
    (folder / "config.json").write_bytes(data)
    try:
        with survives():
            described = parent.describe(str(folder))
            assert described.shape.num_hidden_layers > 0
            described.check_weights()
            # what passes can be loaded
            described.load(parent.torch.float32, parent.torch.device("cpu"))
    finally:
        (folder / "config.json").write_bytes(untouched["config.json"])


@fuzz
@given(st.data())
def test_tokenizers(folder, untouched, data):
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    good = json.loads(untouched[name])
    (folder / name).write_bytes(data.draw(files(good)))
    try:
        with survives():
            tokenizer = parent.describe(str(folder)).tokenizer
            assert tokenizer.eos_token_id is not None
    finally:
        (folder / name).write_bytes(untouched[name])


@fuzz
@given(st.data())
def test_safetensors_headers(scratch, untouched, data):
    path = scratch / "weights" / "model.safetensors"
    path.parent.mkdir(exist_ok=True)
    whole = untouched["model.safetensors"]
    size = int.from_bytes(whole[:8], "little")
    header, rest = whole[8 : 8 + size], whole[8 + size :]
    start = data.draw(
        st.one_of(
            files(json.loads(header)).map(lambda h: len(h).to_bytes(8, "little") + h),
            damaged(whole[: 8 + size]),
            st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little") + header),
        )
    )
    # What hypothesis has drawn it keeps: the tensors are none of it.
    path.write_bytes(start + rest if data.draw(st.booleans()) else start[:64])
    with survives():
        weight_files.stored_dtype(path.parent)
        weight_files.refuse_quantised_tensors("x", weight_files.stored_tensors(path.parent))


INDEX = {
    "metadata": {"total_size": 1},
    "weight_map": {"a": "model.safetensors", "b": "c.safetensors"},
}


@fuzz
@given(files(INDEX))
def test_indices(folder, scratch, data):
    place = scratch / "index"
    place.mkdir(exist_ok=True)
    for name in ("model.safetensors", "c.safetensors"):
        if not (place / name).exists():
            shutil.copyfile(folder / "model.safetensors", place / name)
    (place / weight_files.INDEX).write_bytes(data)
    with survives():
        for path in weight_files.weight_files(place):
            assert path.resolve().parent == place.resolve()


# ------------------------------------------------------------------------- architectures and tables


@fuzz
@given(
    st.one_of(
        files(["gqa_2+gated_96", "linear+no_op"]),
        st.lists(st.text("gqa_ted+linoNOP0123456789", max_size=20)).map(
            lambda names: json.dumps(names).encode()
        ),
    )
)
def test_architectures(scratch, data):
    path = scratch / "blocks.json"
    path.write_bytes(data)
    with survives():
        names = Architecture.from_names(child.read_block_names(path)).names
        assert all("/" not in name for name in names)


VARIANT = {"stats": {"runtime_ms": 3.0, "memory_mib": 2}, "metrics": {"kl_div": 0.5}}
LIBRARY = {f"layer_{i}": {"parent": VARIANT, "none": VARIANT} for i in range(3)}


@fuzz
@given(files(LIBRARY))
def test_published_tables(scratch, data):
    path = scratch / "table.json"
    path.write_bytes(data)
    with survives():
        bounds = published.parse_bounds(["stats.runtime_ms=7"], at_least=False)
        question = published.Question(target="metrics.kl_div", bounds=bounds, gap=0.0)
        published.search(Table.read(path), question)


@fuzz
@given(st.text(max_size=30), st.booleans())
def test_bounds(text, at_least):
    with survives():
        published.parse_bounds([text], at_least=at_least)


COST = {
    "scenario": "main",
    "slot": "attention",
    "variant": "gqa_2",
    "prefill_s": 0.5,
    "decode_s": 0.5,
    "parameters": 3,
    "parameter_bytes": 12,
    "kv_cache_bytes": 5,
    "stderr_s": 0.0,
}
HEADER = {
    "engine": {"engine": "roofline", "version": "1", "device": "moon", "count": 1},
    "measured": False,
    "scenarios": {"main": {}},
    "shape": {"hidden_size": 64},
}


@fuzz
@given(files(COST), files(HEADER))
def test_cost_tables(scratch, line, header):
    (scratch / costs.HEADER).write_bytes(header)
    (scratch / costs.COSTS).write_bytes(line + b"\n")
    with survives():
        _, records, _ = costs.read_given(scratch / costs.COSTS)
        costs.check_complete(records, [], [], "table")


RECORDS = sorted(
    {kind for kind in [*Record.__subclasses__(), Holder] if kind.__module__.startswith("puzzle.")},
    key=lambda kind: (kind.__module__, kind.__name__),
)


@fuzz
@given(st.sampled_from(RECORDS), st.one_of(VALUES, files(HEADER)))
def test_records(scratch, kind, value):
    path = scratch / "record.json"
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    with survives():
        kind.read(path)
    with survives():
        read_records(path, kind)


def test_there_are_records():
    assert len(RECORDS) > 15


# --------------------------------------------------------------------------------------------- text


ROW = {"text": "some words", "messages": [{"role": "user", "content": "hi"}]}
QUESTION = {"context": "a", "choices": ["b", "c"], "answer": 1}


@fuzz
@given(st.lists(files(ROW), max_size=4), st.sampled_from(["text", "body"]))
def test_json_lines(scratch, tokenizer, lines, column):
    path = scratch / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    source = config.SourceConfig(path=str(path), text_column=column)
    with survives():
        assert all(isinstance(d.text, str) for d in sources.documents(source, tokenizer, 0))


@fuzz
@given(st.binary(max_size=300), st.sampled_from([".txt", ".bin", ".jsonl", ".parquet"]))
def test_text_files(scratch, tokenizer, data, suffix):
    path = scratch / f"text{suffix}"
    path.write_bytes(data)
    with survives():
        corpus = config.CorpusConfig(sources=[str(path)])
        sources.check(corpus, tokenizer)


@pytest.fixture(scope="module")
def tokenizer(folder, untouched):
    return parent.describe(str(folder)).tokenizer


@fuzz
@given(st.lists(files(QUESTION), max_size=4))
def test_questions(scratch, lines):
    path = scratch / "questions.jsonl"
    path.write_bytes(b"\n".join(lines))
    with survives():
        tasks.check(str(path))
