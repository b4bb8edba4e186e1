"""A stranger's file, name or machine: nothing of theirs is run, written to, or let in."""

import ast
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from children import job_with_child, write_child
from conftest import make_parent

from puzzle import cli, locks, settings
from puzzle.commands import measuring
from puzzle.config import PlaceConfig
from puzzle.data import rows
from puzzle.engines import vllm_engine
from puzzle.errors import UserError
from puzzle.model import card, parent
from puzzle.model.architecture import Architecture
from puzzle.progress import Progress
from puzzle.run import Run

PACKAGE = Path(parent.__file__).parents[1]
CPU = torch.device("cpu")

# -------------------------------------------------------------------------------- code of strangers

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.hub.load",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "tempfile.mktemp",
}
FORBIDDEN_KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}  # = True


def dangers(source):
    """What runs code of a file, in a module's source."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN_MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in FORBIDDEN_CALLS else []
            found += [
                f"{k.arg}={ast.unparse(k.value)}"
                for k in node.keywords
                if k.arg in FORBIDDEN_KEYWORDS and ast.unparse(k.value) != "False"
            ]
    return found


def test_no_module_runs_what_it_reads():
    found = {path.name: dangers(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 100 and not any(found.values()), found


def test_what_runs_code_is_found():
    source = "import pickle\ntorch.load(x)\neval(y)\nf(trust_remote_code=True, shell=False)\n"
    assert dangers(source) == ["pickle", "torch.load", "eval", "trust_remote_code=True"]


@pytest.fixture
def trace(tmp_path):
    """A file that appears when code of the parent's folder is run."""
    path = tmp_path / "trace"
    yield path
    assert not path.exists()


class Payload:
    """An object whose pickle leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_not_opened_whether_alone_or_beside_safetensors(tmp_path, trace, name):
    folder = make_parent(tmp_path / "parent")
    torch.save({"model.norm.weight": Payload(trace)}, folder / name)
    described = parent.describe(str(folder))
    described.check_weights()
    described.load(torch.float32, CPU)
    assert len(described.tokenizer)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled weights, which are never read"):
        described.check_weights()


def test_code_beside_a_tokenizer_is_not_run(tmp_path, trace):
    folder = make_parent(tmp_path / "parent")
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(trace)!r})\nclass Own: ...\n")
    with pytest.raises(UserError, match="needs code of its own .*, which is never run"):
        _ = parent.describe(str(folder)).tokenizer


ESCAPES = [
    "{{ cycler.__init__.__globals__.os.mkdir('TRACE') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for a in range(10**9) %}{% endfor %}",
    "{{ messages.__class__.__base__.__subclasses__()[0].__init__.__globals__ }}",
    "{% if",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_stays_in_its_box(tmp_path, trace, template):
    folder = make_parent(tmp_path / "parent")
    (folder / "chat_template.jinja").write_text(template.replace("TRACE", str(trace)))
    tokenizer = parent.describe(str(folder)).tokenizer
    source = rows.SourceConfig(path="chats.jsonl")
    row = {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(UserError, match="the chat template refuses it"):
        rows.row_text(row, source, tokenizer, "chats.jsonl, row 1")


def test_a_card_of_a_parent_is_data(tmp_path, trace):
    """Its front matter goes into the child's card, so a bomb or a tag in it must not."""
    folder = make_parent(tmp_path / "parent")
    described = parent.describe(str(folder))
    architecture = Architecture.of_parent(described.shape)
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n"
        for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    wrong = [
        bomb + "license: *h\n",
        "license: !!python/object/apply:os.mkdir [TRACE]\n",
        "a: 2024-99-99",
    ]
    for front in [*wrong, "license: mit"]:
        front = front.replace("TRACE", str(trace))
        (folder / "README.md").write_text(f"---\n{front}\n---\n# A parent\n")
        text = card.text("org/parent", described, architecture)
        assert len(text) < 10_000 and ("license: mit" in text) == (front == "license: mit")


# ----------------------------------------------------------------------------- paths out of the run


def test_no_name_leads_out_of_a_run(tmp_path, tiny_run):
    """Folders that look like children and places wait outside; a stranger's run may name them."""
    tiny_run.write()
    outside = tiny_run.folder.parent / "outside"
    for file in ("child.yaml", "place.yaml"):
        outside.mkdir(exist_ok=True)
        (outside / file).write_text("{}")
    for name in (
        "../../outside",
        str(outside),
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "a\0b",
        "a\n",
        "x" * 65,
    ):
        for find in (tiny_run.child_config, tiny_run.place_config):
            with pytest.raises(UserError, match="expected a name of letters"):
                find(name)
    (tiny_run.folder / "children" / "<b>").mkdir()
    (tiny_run.folder / "children" / "<b>" / "child.yaml").write_text("{}")
    assert tiny_run.child_names() == ["main"]
    written = yaml.safe_load((tiny_run.folder / "run.yaml").read_text())
    written["children"] = {"../../outside": {}}
    (tiny_run.folder / "run.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(UserError, match="children: got '../../outside'; expected a name"):
        Run.open(tiny_run.folder, Progress(quiet=True))


def test_what_a_child_takes_along_is_named_by_us(tmp_path, tiny):
    """Of a parent's folder only known files are copied, whatever else is there."""
    folder = tmp_path / "parent"
    shutil.copytree(tiny.folder, folder)
    for name in ("own.py", "notes.txt", "pytorch_model.bin", "consolidated.safetensors", ".env"):
        (folder / name).write_text("x")
    blocks = ["gqa_1+gated_96", "no_op+gated_32", "gqa_2+no_op", "gqa_2+gated_64"]
    made = write_child(parent.describe(str(folder)), tmp_path / "child", blocks)
    ours = {"README.md", "architecture.json", "config.json", "model.safetensors"}
    ours |= {"configuration_puzzle.py", "modeling_puzzle.py"}
    given = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    names = {path.name for path in made.iterdir()}
    assert names - {"generation_config.json"} == ours | given


# ---------------------------------------------------------------------------------- temporary files


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_link_in_the_place_of_a_lock_leads_to_no_ones_file(tmp_path, temporary):
    """Locks of devices are in the machine's folder for temporary files, where anyone may write."""
    precious = tmp_path / "precious"
    lock = temporary / "puzzle-measuring-cpu.lock"
    dead = locks.Holder(host=os.uname().nodename, pid=2**22 + 1, started="1").model_dump_json()
    for content in ("years of work", dead):
        precious.write_text(content)
        lock.symlink_to(precious)
        try:
            with locks.hold_device("cpu", print):
                assert not lock.is_symlink()
        except UserError as error:
            assert "names no holder" in str(error)
        assert precious.read_text() == content
        lock.unlink(missing_ok=True)


def test_logs_of_a_measurement_are_private(tmp_path, temporary, monkeypatch):
    folders = []
    monkeypatch.setattr(
        measuring.engines, "choose", lambda cost, deploy, logs: folders.append(logs) or 1 / 0
    )
    folder = make_parent(tmp_path / "parent")
    with pytest.raises(ZeroDivisionError):
        measuring.measure(folder, str(folder), PlaceConfig(), 1, Progress(quiet=True))
    assert stat.S_IMODE(folders[0].stat().st_mode) == 0o700 and folders[0].parent == temporary


# ------------------------------------------------------------------------------ what others can see


@pytest.mark.parametrize(
    ("options", "host"), [([], "127.0.0.1"), (["--host", "0.0.0.0"], "0.0.0.0")]
)
def test_a_child_is_served_to_this_machine_unless_told_otherwise(
    tmp_path, monkeypatch, options, host
):
    job = job_with_child(
        tmp_path, ["gqa_1+gated_96", "no_op+gated_32", "gqa_2+no_op", "gqa_2+no_op"]
    )
    started = []
    monkeypatch.setattr(vllm_engine, "unavailable", lambda: None)
    monkeypatch.setattr(os, "execvpe", lambda file, command, environment: started.append(command))
    monkeypatch.setattr("sys.argv", ["puzzle", "serve", str(job.run.folder), *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    (command,) = started
    assert not stopped.value.code
    assert [command[i + 1] for i, word in enumerate(command) if word == "--host"] == [host]
    assert not any("trust" in word for word in command)


@pytest.mark.training
def test_markup_in_a_name_is_text_in_the_report(finished_run, tmp_path):
    """A parent's name is any folder's, and a run's folder may have any name, too."""
    from puzzle.report import stage

    evil = "<img src=x onerror=alert(1)>"
    folder = tmp_path / evil
    shutil.copytree(finished_run.folder, folder)
    recipe = settings.read_yaml(folder / "run.yaml") | {"parent": f"./{evil}"}
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    job = Run.open(folder, Progress(quiet=True)).child_job("main")
    (tmp_path / "report").mkdir()
    stage.WORK.execute(job, tmp_path / "report")
    for name in ("index.html", "architecture.svg"):
        text = (tmp_path / "report" / name).read_text()
        assert "<img src=x" not in text
    assert "&lt;img src=x" in (tmp_path / "report" / "index.html").read_text()
