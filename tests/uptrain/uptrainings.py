"""Uptrainings of a finished run's assembled child with other settings, and what came of them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puzzle import config, pipeline
from puzzle.evaluate.quality import Text, unit_sums
from puzzle.model import child
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.stage import Job, Stage
from puzzle.uptrain import UPTRAIN, trainer
from puzzle.uptrain.trainer import CurvePoint


def assembled(finished_run: Run, folder: Path, processes: int = 1, **settings) -> Job:
    """A copy of a finished run, up to the assembled child, with other settings of uptraining."""
    later_stages = shutil.ignore_patterns("uptrained", "evaluate", "report")
    shutil.copytree(finished_run.folder, folder, ignore=later_stages)
    recipe = finished_run.recipe.model_dump(mode="json") | {"processes": processes}
    recipe["uptrain"] |= settings
    run = Run(config.parse(recipe), folder, Progress(quiet=True))
    run.write()
    return run.child_job("main")


def uptrained(finished_run: Run, folder: Path, **settings) -> Job:
    """The same, uptrained."""
    job = assembled(finished_run, folder, **settings)
    pipeline.execute_stage(UPTRAIN, job)
    return job


def weights(job: Job, stage: Stage = UPTRAIN) -> dict[str, torch.Tensor]:
    return load_file(job.folder(stage) / "model.safetensors")


def load(job: Job, stage: Stage = UPTRAIN) -> PuzzleForCausalLM:
    device, attention = job.run.device.torch_device, job.run.placement.attention
    return child.load(job.folder(stage), torch.float32, device, attention)


def held_out_means(job: Job, model: PuzzleForCausalLM) -> dict[str, float]:
    """What `evaluate` finds on the text that the trainer validates on, by metric."""
    text = Text.of(job.run, "validation", trainer.VALIDATION_SEQUENCES)
    found = unit_sums(job.run, model, text, job.child.evaluate.batch_sequences)
    return {metric: found.mean(metric).value for metric in found.metrics}


def figures(point: CurvePoint) -> dict[str, float]:
    """Every figure of a point of the curve, those of the validation by `validation_<name>`."""
    validation = {f"validation_{name}": v for name, v in (point.validation or {}).items()}
    counts = {"step": point.step, "tokens": point.tokens, "skipped_steps": point.skipped_steps}
    return counts | point.losses | validation


def assert_same_curve(job: Job, reference: Job, rel: float = 1e-4) -> None:
    points, reference_points = trainer.read_curve(job), trainer.read_curve(reference)
    assert len(points) == len(reference_points) > 0
    for point, reference_point in zip(points, reference_points, strict=True):
        values, expected = figures(point), figures(reference_point)
        assert values.keys() == expected.keys()
        for name, value in values.items():
            if "top" not in name and "retention" not in name:  # counts of a few tokens jump
                assert value == pytest.approx(expected[name], rel=rel), (point.step, name)
