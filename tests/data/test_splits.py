"""Text that reports is never text that chose: which documents every stage reads."""

import re

import pytest

from puzzle import config, pipeline
from puzzle.assemble import ASSEMBLE
from puzzle.cost import COST
from puzzle.data.sequences import Sequences
from puzzle.evaluate import EVALUATE
from puzzle.library import LIBRARY
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import SCORE
from puzzle.search import SEARCH, validate
from puzzle.uptrain import UPTRAIN

STAGES = (LIBRARY, SCORE, COST, SEARCH, ASSEMBLE, UPTRAIN, EVALUATE)
pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def reads(finished_run, tmp_path_factory):
    """By stage and side of the split: the numbers of the text files whose tokens were read.

    The files are known by the names in their text, not by what the corpus says of them.
    """
    found: dict[tuple[str, str], set[int]] = {}
    now = [""]
    recipe = finished_run.recipe.model_dump(mode="json")
    recipe["score"] |= {"task": "held-out", "task_questions": 4}
    folder = tmp_path_factory.mktemp("reads") / "run"
    run = Run(config.parse(recipe), folder, Progress(quiet=True))
    run.write()
    real = Sequences.rows

    def rows(side, indices):
        tokens = real(side, indices)
        text = run.parent.tokenizer.decode(tokens.flatten().tolist())
        names = {int(number) for number in re.findall(r"add_(\d+)_\d", text)}
        found.setdefault((now[0], side.split), set()).update(names)
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sequences, "rows", rows)
        job = run.child_job("main")
        for stage in STAGES:
            now[0] = stage.name
            pipeline.execute_stage(stage, job)
        now[0] = "validate"
        validate.validate(run, 4)
    return found


def test_every_stage_reads_the_sides_that_are_its_own(reads):
    sides = {(stage, side) for stage, side in reads}
    assert sides == {
        ("library", "train"),
        ("library", "validation"),
        ("score", "score"),
        ("uptrain", "train"),
        ("uptrain", "validation"),
        ("evaluate", "test"),
        ("validate", "score"),
    }


def test_the_documents_that_report_chose_nothing(reads):
    by_side: dict[str, set[int]] = {}
    for (_, side), names in reads.items():
        by_side.setdefault(side, set()).update(names)
    assert set(by_side) == {"train", "score", "validation", "test"} and all(by_side.values())
    for side, names in by_side.items():
        others = set().union(*(other for name, other in by_side.items() if name != side))
        assert not names & others, side
