"""A file of every kind that was truncated, deleted, or has one bit flipped, in a finished run.

`puzzle run` again names it and makes it again, to the same bytes, or refuses in one line.
"""

import shutil

import pytest
from interrupted_runs import assert_same

from puzzle import artifacts, pipeline
from puzzle.errors import UserError
from puzzle.export import stage as export
from puzzle.library import LIBRARY
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.stage import Job
from puzzle.uptrain import UPTRAIN

pytestmark = pytest.mark.training
CHILD = "children/main"
KINDS = (
    "run.yaml",
    "checksums.jsonl",
    "parent/parent.json",
    "parent/config.json",
    "corpus/train-00000.safetensors",
    "corpus/score.json",
    "library/002.ffn.gated_64.safetensors",
    "library/index.jsonl",
    "library/curve.jsonl",
    "library/manifest.json",
    "score/scores.jsonl",
    "score/manifest.json",
    "places/here/place.yaml",
    "places/here/cost/header.json",
    "places/here/cost/fits.jsonl",
    "places/here/cost/costs.jsonl",
    f"{CHILD}/child.yaml",
    f"{CHILD}/measured.jsonl",
    f"{CHILD}/search/solutions.json",
    f"{CHILD}/search/frontier.jsonl",
    f"{CHILD}/child/model.safetensors",
    f"{CHILD}/child/config.json",
    f"{CHILD}/child/measured.json",
    f"{CHILD}/uptrained/model.safetensors",
    f"{CHILD}/uptrained/curve.jsonl",
    f"{CHILD}/uptrained/manifest.json",
    f"{CHILD}/evaluate/results.json",
    f"{CHILD}/report/index.html",
)


def flip(path):
    data = bytearray(path.read_bytes())
    data[2 * len(data) // 3] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path):
    path.unlink()


def check(command, uninterrupted, tally, out, damages) -> None:
    """`damages`: what is done to which files, at once."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(uninterrupted.folder, out)
    with tally.fault("damaged file", len(damages)):
        for damage, name in damages:
            damage(out / name)
        outcome = command.run(out)
        if outcome.status != 0:
            assert outcome.status == 2 and len(outcome.lines) == 1, outcome.lines
            assert any(str(out / name) in outcome.lines[0] for _, name in damages), outcome.lines
        else:
            assert_same(out, uninterrupted)
    shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, truncate, delete])
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_made_again_or_refused(command, uninterrupted, tally, name, damage):
    damages = [(damage, name)]
    if name.startswith("corpus"):  # it is verified when it is read, which needs something to do
        damages.append((delete, f"{CHILD}/evaluate/results.json"))
    check(command, uninterrupted, tally, command.folder / "damaged", damages)


def test_three_damaged_files_are_made_again(command, uninterrupted, tally):
    damages = [
        (flip, "library/002.ffn.gated_64.safetensors"),
        (truncate, f"{CHILD}/child/model.safetensors"),
        (delete, f"{CHILD}/evaluate/results.json"),
    ]
    check(command, uninterrupted, tally, command.folder / "three", damages)


@pytest.fixture
def copy(finished_run, tmp_path) -> Run:
    shutil.copytree(finished_run.folder, tmp_path / "run")
    return Run(finished_run.recipe, tmp_path / "run", Progress(quiet=True))


def test_only_the_damaged_variants_of_a_library_are_trained_again(copy, monkeypatch):
    folder = copy.folder / "library"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    flip(folder / "001.attention.gqa_1.safetensors")
    said = []
    monkeypatch.setattr(copy.progress, "say", said.append)
    pipeline.execute_stage(LIBRARY, Job(copy))
    assert any("001.attention.gqa_1.safetensors is damaged" in line for line in said)
    for name, data in before.items():
        if not name.endswith("manifest.json"):
            assert (folder / name).read_bytes() == data, name
    weights = [name for name in before if name.endswith(".safetensors")]
    made = [name for name in weights if (folder / name).stat().st_mtime_ns != times[name]]
    assert made == ["001.attention.gqa_1.safetensors"]


def test_a_later_stage_refuses_a_damaged_earlier_one_and_says_what_makes_it_again(copy):
    truncate(copy.folder / "library" / "000.ffn.linear.safetensors")
    with pytest.raises(UserError, match=r"000.ffn.linear.safetensors is damaged.*`puzzle library"):
        pipeline.execute_stage(SCORE, Job(copy))
    job = copy.child_job("main")
    flip(job.folder(UPTRAIN) / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors is damaged.*`puzzle uptrain"):
        export.source(job)


def test_every_line_of_a_list_has_a_checksum(copy):
    """A digit that is flipped in a file that grows, and so is in no manifest, is noticed."""
    path = copy.folder / CHILD / "measured.jsonl"
    line = path.read_text()
    digit = next(i for i in range(len(line) // 2, len(line)) if line[i] in "3456")
    path.write_text(line[:digit] + "7" + line[digit + 1 :])
    with pytest.raises(UserError, match=r"measured.jsonl, line 1: is damaged"):
        artifacts.read_records(path, artifacts.Record)
