"""Tasks of lm-evaluation-harness (the extra `eval`), for parent, child and uptrained child.

The models run in this process, through the harness's own Hugging Face class, so its figures are
those of its command line. Results are kept as the harness writes them, one file per task and model
(`lm_eval/<task>.<model>.json`), and their metrics stand among ours.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from puzzle import artifacts
from puzzle.config import YAML_SUFFIXES, HarnessTask
from puzzle.data.tasks import name_in_file
from puzzle.engines.intervals import Interval
from puzzle.errors import UserError
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.run import Run

FOLDER = "lm_eval"
NORMAL_95 = 1.96  # standard errors on each side of a 95 % interval


def check(tasks: list[HarnessTask]) -> None:
    """Raises `UserError` where the harness is missing or does not know a task."""
    if not tasks:
        return
    if find_spec("lm_eval") is None:
        raise UserError(
            f"evaluate.tasks: got {tasks[0].task}, but lm-eval is not installed; "
            "pip install lm-eval"
        )
    for task in tasks:
        _loaded(task)


def _loaded(task: HarnessTask) -> tuple[str, Any]:
    """(the task's name, the harness's task manager that knows it)."""
    from lm_eval.tasks import TaskManager

    path = Path(task.task).expanduser()
    is_file = path.suffix in YAML_SUFFIXES
    if is_file and not path.is_file():
        raise UserError(f"evaluate.tasks: {path}: no such file; expected a task of lm-eval")
    manager = TaskManager(include_path=str(path.parent) if is_file else None)
    name = name_in_file(path, "evaluate.tasks") if is_file else task.task
    if name not in manager.all_tasks:
        raise UserError(
            f"evaluate.tasks: lm-eval knows no task {name!r}; expected one of `lm_eval ls tasks`, "
            "or the path of a task's YAML file"
        )
    return name, manager


def result_path(folder: Path, task: HarnessTask, model: str) -> Path:
    """Where the harness's results for a task and a model are."""
    return folder / FOLDER / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task.label)}.{model}.json"


def evaluate(
    run: Run, model: PuzzleForCausalLM, task: HarnessTask, batch_sequences: int
) -> dict[str, JsonValue]:
    """The harness's results for one task, as its command line writes them."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import handle_non_serializable

    name, manager = _loaded(task)
    served = HFLM(
        pretrained=model,
        tokenizer=run.parent.tokenizer,
        batch_size=batch_sequences,
        max_length=int(run.parent.hf_config.max_position_embeddings),
        backend="causal",
    )
    results = lm_eval.simple_evaluate(
        served,
        tasks=[name],
        num_fewshot=task.shots,
        limit=task.limit,
        task_manager=manager,
        log_samples=False,
    )
    found: dict[str, JsonValue] = json.loads(json.dumps(results, default=handle_non_serializable))
    return found


def metrics(folder: Path, task: HarnessTask, model: str) -> dict[str, Interval]:
    """By `task metric`: the figures of a model, with intervals from standard errors."""
    found: dict[str, Interval] = {}
    results: Any = artifacts.read_object(result_path(folder, task, model))["results"]
    for name, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if metric in ("alias", "sample_len", "name"):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            spread = NORMAL_95 * error if isinstance(error, int | float) else 0.0
            found[f"{task.with_shots(name)} {metric}"] = Interval(
                value=value, low=value - spread, high=value + spread
            )
    return found
