"""Tasks of lm-evaluation-harness: the figures of its own command line, and files in its format."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import yaml

from puzzle import config
from puzzle.config import HarnessTask
from puzzle.errors import UserError
from puzzle.evaluate import harness
from puzzle.run import Run
from puzzle.uptrain import UPTRAIN

NEEDS_HARNESS = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "num_fewshot": 2,
        "fewshot_split": "train",
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "said": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
}


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for split, count in (("train", 6), ("test", 12)):
        rows = [
            {
                "question": f"def add_{i}(left, right):\n    return",
                "choices": [" left", " right", " number"],
                "answer": i % 3,
            }
            for i in range(count)
        ]
        (folder / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(folder / f"{split}.json") for split in ("train", "test")}
    for name, task in TASKS.items():
        common = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "training_split": "train",
            "test_split": "test",
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


@NEEDS_HARNESS
@pytest.mark.slow
def test_three_local_tasks_are_as_the_harnesss_own_command_line_has_them(
    finished_run, task_files, tmp_path
):
    """Through `puzzle evaluate`'s own function for parent and child, and `lm_eval --model hf`."""
    run = finished_run
    tasks = [HarnessTask(task=str(task_files / f"{name}.yaml"), limit=10) for name in TASKS]
    harness.check(tasks)
    job = run.child_job("main")
    for name, folder in (("parent", run.parent.folder), ("uptrained", job.folder(UPTRAIN))):
        from puzzle.evaluate.stage import _load

        model = _load(job, name, "resident")
        for task in tasks:
            ours = harness.evaluate(run, model, task, 4)["results"]
            theirs = _command_line(folder, task, tmp_path / f"{name}")
            for metrics in (ours, theirs):
                for values in metrics.values():
                    values.pop("alias", None)
            assert ours.keys() == theirs.keys()
            for key, values in theirs.items():
                for metric, value in values.items():
                    if isinstance(value, float):
                        assert ours[key][metric] == pytest.approx(value, rel=1e-4, abs=1e-6)


def _command_line(folder, task, out):
    code = (
        "import puzzle.model.modeling_puzzle, sys; from lm_eval.__main__ import cli_evaluate; "
        "cli_evaluate()"
    )
    words = ["--model", "hf", "--model_args", f"pretrained={folder},dtype=float32,max_length=256"]
    words += ["--tasks", task.task, "--limit", str(task.limit), "--output_path", str(out)]
    words += ["--device", "cpu", "--batch_size", "4"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = out.rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    path.unlink()
    return results


@NEEDS_HARNESS
@pytest.mark.training
def test_evaluate_keeps_the_harnesss_files_and_shows_their_metrics(
    finished_run, task_files, tmp_path
):
    import shutil

    from puzzle import pipeline
    from puzzle.evaluate import EVALUATE
    from puzzle.evaluate import results as evaluation

    shutil.copytree(finished_run.folder, tmp_path / "run")
    child = finished_run.child_config("main")
    task = {"task": str(task_files / "choices.yaml"), "limit": 6, "shots": 1}
    settings = config.EvaluateConfig(**child.evaluate.model_dump() | {"tasks": [task]})
    run = Run(finished_run.recipe, tmp_path / "run", finished_run.progress)
    run.write_child("main", child.model_copy(update={"evaluate": settings}))
    job = run.child_job("main")
    pipeline.execute_stage(EVALUATE, job)
    results = evaluation.read(job)
    shown = {task.name: task for task in results.tasks if task.source == "lm-eval"}
    assert {"local_choices-1-shot acc", "local_choices-1-shot acc_norm"} <= shown.keys()
    kept = job.folder(EVALUATE) / "lm_eval"
    files = sorted(path.name for path in kept.iterdir())
    assert files == [f"choices-1-shot.{model}.json" for model in ("child", "parent", "uptrained")]
    theirs = json.loads(
        (job.folder(EVALUATE) / "lm_eval" / "choices-1-shot.uptrained.json").read_text()
    )
    assert theirs["n-shot"]["local_choices"] == 1
    expected = theirs["results"]["local_choices"]["acc,none"]
    assert shown["local_choices-1-shot acc"].uptrained.value == expected


@NEEDS_HARNESS
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("no_such_task", "lm-eval knows no task 'no_such_task'"),
        ("nowhere.yaml", "nowhere.yaml: no such file"),
    ],
)
def test_a_task_that_is_not_there_is_named_before_anything_is_spent(task, message):
    with pytest.raises(UserError, match=message):
        harness.check([HarnessTask(task=task)])


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed; pip install lm-eval$"):
        harness.check([HarnessTask(task="arc_easy")])
    harness.check([])
