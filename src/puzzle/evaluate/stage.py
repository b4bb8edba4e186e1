"""Stage `evaluate`: parent, child and uptrained child on test text, and once more served.

Quality (`quality.py`): KL(parent || model) in nats per token, LM loss, top-1 and top-5 token
accuracy; retention is the model's top-1 accuracy over the parent's. Test text has chosen nothing:
no other stage reads it. Speed: the uptrained child against the parent, a few steps in turn, beside
what the cost model predicted. The promise is judged by this measurement.

Reads: `child/`, `uptrained/`, the test side of the corpus, the search's answer, costs. Writes:
`evaluate/results.json` and `evaluate/quality.json` (`results.py`).
"""

from pathlib import Path

import torch

from puzzle.artifacts import Inputs
from puzzle.assemble import ASSEMBLE, measured
from puzzle.assemble.stage import serving_need
from puzzle.cost.table import read_header, serving_facts
from puzzle.data import tasks
from puzzle.evaluate.quality import Text, right_answers, unit_sums
from puzzle.evaluate.results import (
    QUALITY,
    RESULTS,
    ModelQuality,
    ModelResult,
    Qualities,
    Quality,
    Results,
)
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.search import answers
from puzzle.stage import Job, Need, Work
from puzzle.uptrain import UPTRAIN


def _facts(job: Job) -> Inputs:
    task = tasks.fingerprint(job.run.recipe.score.task)
    return job.run.data_facts | {"task": task} | serving_facts(job)


def _execute(job: Job, folder: Path) -> None:
    run, answer = job.run, answers.read(job)
    if not (folder / QUALITY).exists():
        _qualities(job).write(folder / QUALITY)
    qualities = Qualities.read(folder / QUALITY)
    architecture = child.read_architecture(job.folder(ASSEMBLE))
    parent_architecture = Architecture.of_parent(run.parent.shape)
    served = measured.measure(job, job.folder(UPTRAIN))

    def result(shown: ModelQuality, blocks: Architecture) -> ModelResult:
        elements = blocks.kv_elements_per_token(run.parent.shape)
        return ModelResult(
            quality=Quality.of(shown),
            retention=shown.text.retention(qualities.parent.text),
            parameters=blocks.parameters(run.parent.shape),
            kv_cache_bytes_per_token=elements * run.parent.dtype.itemsize,
        )

    results = Results(
        parent=result(qualities.parent, parent_architecture),
        child=result(qualities.child, architecture),
        uptrained=result(qualities.uptrained, architecture),
        evaluated_tokens=sum(qualities.parent.text.tokens),
        architecture=architecture.names,
        batch_size=answer.batch_size,
        predicted_parent=answer.parent["main"],
        predicted_child=answer.best.predicted["main"],
        served=served,
        costs=read_header(job),
    )
    results.write(folder / RESULTS)
    for line in measured.compare(measured.read(job), served):
        run.progress.say(f"  {line}")


def _qualities(job: Job) -> Qualities:
    run, settings = job.run, job.child.evaluate
    text = Text.of(run, "test", settings.sequences)
    by_name = {}
    folders = {"parent": None, "child": job.folder(ASSEMBLE), "uptrained": job.folder(UPTRAIN)}
    device, attention = run.device.torch_device, run.placement.attention
    with run.progress.task("quality on test text", len(folders), "models") as task:
        for name, folder in folders.items():
            model = run.parent_model
            if folder is not None:
                model = child.load(folder, torch.float32, device, attention)
            is_asked = run.recipe.score.task is not None
            by_name[name] = ModelQuality(
                text=unit_sums(run, model, text, settings.batch_sequences),
                right=right_answers(run, model) if is_asked else None,
            )
            task.advance()
    return Qualities(**by_name)


def _need(job: Job) -> Need:
    run = job.run
    serving = serving_need(job)
    parameters = Architecture.of_parent(run.parent.shape).parameters(run.parent.shape)
    tokens = job.child.evaluate.sequences * run.recipe.corpus.sequence_length
    flops = 3 * 2.0 * tokens * parameters
    weights = parameters * run.placement.dtype.itemsize
    return Need(
        tokens=tokens,
        flops=flops,
        memory_bytes=max(2.0 * weights, serving.memory_bytes),
        disk_bytes=1e6,
        seconds=flops / run.device.training_flops_per_s + serving.seconds,
    )


WORK = Work(facts=_facts, execute=_execute, need=_need)
