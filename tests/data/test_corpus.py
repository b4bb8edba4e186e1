import copy
import itertools
import json
import time
from typing import get_args

import numpy as np
import pytest
from conftest import TEXT, make_tokenizer
from tokenizers.processors import TemplateProcessing

from puzzle import artifacts
from puzzle.config import CorpusConfig
from puzzle.data import corpus, packing, sources
from puzzle.data.packing import Tokenised
from puzzle.data.sequences import Split
from puzzle.errors import UserError
from puzzle.progress import Progress
from puzzle.run import Run

BUDGET = {"held_out_fraction": 0.5, "train_tokens": 10**6, "held_out_tokens": 10**6}
SIDES = get_args(Split)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def build(tmp_path, tokenizer, sources, **settings):
    length = settings.pop("sequence_length", 16)
    config = CorpusConfig(sources=sources, sequence_length=length, **(BUDGET | settings))
    return corpus.build(
        config,
        tokenizer,
        tmp_path / "corpus",
        tokenizer_fingerprint="t",
        progress=Progress(quiet=True),
    )


@pytest.mark.parametrize(("asked", "is_said"), [(64, False), (10**6, True)])
def test_a_corpus_that_ends_before_its_training_tokens_says_so(
    tmp_path, tokenizer, text_folder, monkeypatch, asked, is_said
):
    said: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda self, text: said.append(text))
    data = build(tmp_path, tokenizer, [str(text_folder)], train_tokens=asked)
    ends = f"the corpus ends at {16 * len(data['train']):,} training tokens"
    assert any(ends in text for text in said) == is_said


def test_a_damaged_corpus_is_made_again_and_says_so(tmp_path, tokenizer, text_folder, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda self, text: said.append(text))
    before = build(tmp_path, tokenizer, [str(text_folder)])["train"].rows([0]).tolist()
    assert not any("made again" in text for text in said)
    damaged = max((tmp_path / "corpus").iterdir(), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    after = build(tmp_path, tokenizer, [str(text_folder)])["train"].rows([0]).tolist()
    assert after == before and any(damaged.name in text for text in said)


def texts(count):
    return [TEXT.replace("add", f"name_{i}") for i in range(count)]


def decoded(tokenizer, sequences):
    rows = sequences.rows(range(len(sequences)))
    return tokenizer.decode(rows.flatten().tolist())


def test_the_sides_share_no_document(tmp_path, tokenizer, text_folder):
    data = build(tmp_path, tokenizer, [str(text_folder)])
    texts = [decoded(tokenizer, data[side]) for side in SIDES]
    names = [{f"add_{i}_0" for i in range(80) if f"add_{i}_0(" in text} for text in texts]
    assert all(names) and sum(map(len, names)) == len(set().union(*names))


def test_the_side_of_a_document_depends_on_its_name_alone():
    before, after = (sources.Document("a/b.py", text) for text in ("one", "two"))
    assert packing.split_of(before, 0.5) == packing.split_of(after, 0.5)
    sides = [packing.split_of(sources.Document(f"f{i}", ""), 0.2) for i in range(2000)]
    shares = {side: sides.count(side) / 2000 for side in SIDES}
    expected = {"train": 0.8, "score": 0.05, "validation": 0.05, "test": 0.1}
    assert shares == pytest.approx(expected, abs=0.02)


def test_a_text_seen_twice_is_kept_once(tmp_path, tokenizer):
    folder = tmp_path / "twins"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT * 3)
    config = CorpusConfig(sources=[str(folder)], held_out_fraction=0.5)
    taken: dict[str, None] = {}  # held-out sides are built first and hand their texts on to train
    found = [
        list(packing.tokenised_documents(config.sources[0], side, config, tokenizer, taken))
        for side in reversed(SIDES)
    ]
    assert sum(map(len, found)) == 2


def test_the_same_seed_gives_the_same_sequences_and_another_seed_another_order(
    tmp_path, tokenizer, text_folder
):
    first, again, other = (
        build(tmp_path / name, tokenizer, [str(text_folder)], seed=seed)["train"].batch(0, 8)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.equal(again) and not first.equal(other)


def test_batches_cover_an_epoch_exactly_once_whatever_their_size(tmp_path, tokenizer, text_folder):
    data = build(tmp_path, tokenizer, [str(text_folder)])["train"]
    rows = list(
        itertools.chain.from_iterable(
            data.batch(step, 7).tolist() for step in range(len(data) // 7 + 1)
        )
    )
    assert sorted(rows[: len(data)]) == sorted(data.rows(range(len(data))).tolist())


def test_a_mixture_keeps_its_weights_in_tokens():
    streams = [
        iter([Tokenised(0, [0] * 10, [True] * 10)] * 300),
        iter([Tokenised(1, [1] * 3, [True] * 3)] * 1000),
    ]
    taken = itertools.islice(packing.mixture(streams, [3.0, 1.0]), 400)
    tokens = np.concatenate([document.ids for document in taken])
    assert (tokens == 0).mean() == pytest.approx(0.75, abs=0.02)
    single = [iter([Tokenised(number, [number], [True])] * 9) for number in (0, 1)]
    order = [document.number for document in packing.mixture(single, [1.0, 3.0])]
    assert order[:8] == [0, 1, 1, 1, 0, 1, 1, 1]


def test_one_long_text_file_has_all_sides(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("\n".join(texts(800)))
    data = build(tmp_path, tokenizer, [str(tmp_path / "book.txt")])
    assert len(data["train"]) > len(data["validation"]) > 0


def test_a_text_in_two_sources_never_stands_on_two_sides(tmp_path, tokenizer):
    """The same texts as named files and as rows: names and texts hash to different sides."""
    folder = tmp_path / "files"
    folder.mkdir()
    for i, text in enumerate(texts(90)):
        (folder / f"{i}.txt").write_text(text)
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in texts(90))
    )
    data = build(
        tmp_path, tokenizer, [str(folder), str(tmp_path / "rows.jsonl")], held_out_fraction=0.5
    )
    texts_of_sides = [decoded(tokenizer, data[side]) for side in SIDES]
    names = [{i for i in range(90) if f"name_{i}(" in text} for text in texts_of_sides]
    assert all(names) and sum(map(len, names)) == len(set().union(*names))


def test_a_stream_that_ends_leaves_the_rest_to_the_others():
    streams = [iter([Tokenised(0, [0], [True])] * 5), iter([Tokenised(1, [1], [True])] * 50)]
    assert len(list(packing.mixture(streams, [1.0, 1.0]))) == 55


def test_packing_keeps_every_token_in_order_and_drops_only_the_last_rest():
    texts = ([1, 2, 3], [4], [5, 6, 7, 8, 9], [0])
    documents = [Tokenised(i, ids, [id % 2 == 0 for id in ids]) for i, ids in enumerate(texts)]
    tokens, numbers, counted = np.stack(list(packing.pack(documents, 4)), axis=1).tolist()
    assert tokens == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert numbers == [[0, 0, 0, 1], [2, 2, 2, 2]]
    assert counted == [[0, 1, 0, 1], [0, 1, 0, 1]]


def test_every_sequence_begins_as_a_document_does():
    """9 begins a text. A sequence that starts with a document has it once."""
    texts = ([9, 1, 2, 3, 4], [9, 5], [9, 6, 7, 8])
    documents = [Tokenised(i, ids, [True] * len(ids)) for i, ids in enumerate(texts)]
    tokens, numbers, _ = np.stack(list(packing.pack(documents, 3, [9])), axis=1).tolist()
    assert tokens == [[9, 1, 2], [9, 3, 4], [9, 5, 9], [9, 6, 7]]
    assert numbers == [[0, 0, 0], [0, 0, 0], [1, 1, 2], [2, 2, 2]]


def test_documents_begin_and_end_as_the_tokenizer_makes_them_by_default(tokenizer):
    """A tokenizer may prepend a token, or a chat template may have written it already."""
    assert packing.Frame.of(tokenizer) == ([], [tokenizer.eos_token_id])
    with_bos = copy.deepcopy(tokenizer)
    bos = tokenizer.convert_tokens_to_ids("!")
    with_bos._tokenizer.post_processor = TemplateProcessing(
        single="! $A", pair="! $A $B", special_tokens=[("!", bos)]
    )
    frame = packing.Frame.of(with_bos)
    assert frame == ([bos], [tokenizer.eos_token_id])
    for ids in ([5, 6], [bos, 5, 6]):
        assert frame.around(0, ids, None).ids == [bos, 5, 6, tokenizer.eos_token_id]
    assert frame.around(0, [5, 6], [True, False]).counted == [False, True, False, False]


def test_every_document_ends_with_the_end_of_text_token(tokenizer):
    config = CorpusConfig(sources=["stdlib"])
    _, ids, _ = next(packing.tokenised_documents(config.sources[0], "train", config, tokenizer, {}))
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]


def test_a_changed_file_makes_the_corpus_anew(tmp_path, tokenizer):
    folder = tmp_path / "text"
    folder.mkdir()
    for i, text in enumerate(texts(90)):
        (folder / f"{i}.txt").write_text(text)
    began = time.perf_counter()
    build(tmp_path, tokenizer, [str(folder)])
    before = artifacts.read_manifest(tmp_path / "corpus")
    assert 0 < before.seconds < time.perf_counter() - began
    build(tmp_path, tokenizer, [str(folder)])
    assert artifacts.read_manifest(tmp_path / "corpus") == before
    (folder / "3.txt").write_text(TEXT * 9)
    build(tmp_path, tokenizer, [str(folder)])
    assert artifacts.read_manifest(tmp_path / "corpus").inputs != before.inputs


def test_a_missing_source_and_an_empty_side_are_user_errors(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no such file or folder"):
        build(tmp_path, tokenizer, [str(tmp_path / "nothing")])
    (tmp_path / "one.txt").write_text(TEXT)
    with pytest.raises(UserError, match="holds less than one sequence"):
        build(tmp_path, tokenizer, [str(tmp_path / "one.txt")])


def test_a_build_interrupted_between_the_sides_ends_with_the_same_files(
    tmp_path, tokenizer, text_folder
):
    def files():
        """The bytes of every file; of the manifest all but the time it took."""
        contents = {path.name: path.read_bytes() for path in folder.iterdir()}
        manifest = artifacts.read_manifest(folder)
        return contents | {"manifest.json": manifest.model_copy(update={"seconds": 0.0})}

    folder = tmp_path / "corpus"
    build(tmp_path, tokenizer, [str(text_folder)])
    before = files()
    for name in ("manifest.json", "train.json", "train-00000.safetensors", "test.json"):
        (folder / name).unlink()
    build(tmp_path, tokenizer, [str(text_folder)])
    assert files() == before


def test_a_token_counts_where_its_first_character_lies_in_a_span():
    offsets = [(0, 3), (3, 5), (5, 8), (8, 9)]
    assert packing._counted(offsets, [(3, 5), (8, 9)]) == [False, True, False, True]


def test_held_out_sides_have_their_shares_of_the_tokens(tiny_run):
    """A quarter to score, a quarter to validate, half to report."""
    asked, settings = 1024, tiny_run.recipe.corpus
    few = settings.model_copy(update={"held_out_tokens": asked})
    recipe = tiny_run.recipe.model_copy(update={"corpus": few})
    corpus = Run(recipe, tiny_run.folder, tiny_run.progress).corpus
    for split, share in (("score", 0.25), ("validation", 0.25), ("test", 0.5)):
        tokens = len(corpus[split]) * settings.sequence_length
        assert share * asked - settings.sequence_length < tokens <= share * asked
