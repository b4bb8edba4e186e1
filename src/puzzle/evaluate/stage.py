"""Stage `evaluate`: parent, child and uptrained child on held-out text, and once more served.

Quality: KL(parent || model) in nats per token, LM loss, top-1 and top-5 token accuracy; retention
is the model's top-1 accuracy over the parent's. Speed: the uptrained child against the parent, a
few steps in turn, beside what the cost model predicted. The promise is judged by this measurement.

Reads: `child/`, `uptrained/`, the validation side of the corpus, the search's answer, costs.
Writes: `evaluate/results.json` (`results.py`).

Shape legend: N sequences, B of a batch, S positions, M metrics.
"""

from pathlib import Path

import torch

from puzzle.artifacts import Inputs
from puzzle.assemble import ASSEMBLE, measured
from puzzle.assemble.stage import serving_need
from puzzle.cost.table import read_header
from puzzle.data import tasks
from puzzle.evaluate.results import (
    QUALITY,
    RESULTS,
    ModelResult,
    Qualities,
    Quality,
    Results,
)
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.run import Run
from puzzle.search import answers
from puzzle.stage import Job, Need, Work
from puzzle.training.losses import METRICS, token_metrics
from puzzle.uptrain import UPTRAIN


def _facts(job: Job) -> Inputs:
    return job.run.data_facts | {"task": tasks.fingerprint(job.run.recipe.score.task)}


def _execute(job: Job, folder: Path) -> None:
    run, answer = job.run, answers.read(job)
    tokens_NS = run.corpus["validation"].head(job.child.evaluate.sequences)
    if not (folder / QUALITY).exists():
        _qualities(job, tokens_NS).write(folder / QUALITY)
    qualities = Qualities.read(folder / QUALITY)
    architecture = child.read_architecture(job.folder(ASSEMBLE))
    parent_architecture = Architecture.of_parent(run.parent.shape)
    served = measured.measure(job, job.folder(UPTRAIN))
    parent_top1 = qualities.parent.top1

    def result(quality: Quality, blocks: Architecture) -> ModelResult:
        elements = blocks.kv_elements_per_token(run.parent.shape)
        return ModelResult(
            quality=quality,
            retention=quality.top1 / parent_top1 if parent_top1 else None,
            parameters=blocks.parameters(run.parent.shape),
            kv_cache_bytes_per_token=elements * run.parent.dtype.itemsize,
        )

    results = Results(
        parent=result(qualities.parent, parent_architecture),
        child=result(qualities.child, architecture),
        uptrained=result(qualities.uptrained, architecture),
        evaluated_tokens=tokens_NS[:, 1:].numel(),
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


def _qualities(job: Job, tokens_NS: torch.Tensor) -> Qualities:
    run = job.run
    by_name = {}
    folders = {"parent": None, "child": job.folder(ASSEMBLE), "uptrained": job.folder(UPTRAIN)}
    device, attention = run.device.torch_device, run.placement.attention
    with run.progress.task("held-out quality", len(folders), "models") as task:
        for name, folder in folders.items():
            model = run.parent_model
            if folder is not None:
                model = child.load(folder, torch.float32, device, attention)
            by_name[name] = quality(job, model, tokens_NS)
            task.advance()
    return Qualities(**by_name)


@torch.no_grad()
def quality(job: Job, model: PuzzleForCausalLM, tokens_NS: torch.Tensor) -> Quality:
    """Means per token of every metric of `model` against the parent."""
    run = job.run
    sums_M, count = torch.zeros(len(METRICS), dtype=torch.float64), 0
    parent = run.parent_model
    for rows_BS in tokens_NS.split(job.child.evaluate.batch_sequences):
        tokens_BS = rows_BS.to(run.device.torch_device)
        with run.device.autocast():
            parent_BSD, model_BSD = (
                one.model(tokens_BS, use_cache=False).last_hidden_state for one in (parent, model)
            )
            metrics_CMT = token_metrics(
                parent_BSD[:, :-1].flatten(0, 1),
                parent.lm_head.weight,
                model_BSD[None, :, :-1].flatten(1, 2),
                model.lm_head.weight,
                tokens_BS[:, 1:].flatten(),
                soft_cap=parent.config.final_logit_softcapping,
            )
        sums_M += metrics_CMT[0].double().sum(-1).cpu()
        count += metrics_CMT.shape[-1]
    means = dict(zip(METRICS, (sums_M / count).tolist(), strict=True))
    means["kl"] = max(0.0, means["kl"])  # rounding may take a KL of 0 just below it
    accuracy = task_accuracy(run, model) if run.recipe.score.task is not None else None
    return Quality(**means, task=accuracy)


@torch.no_grad()
def task_accuracy(run: Run, model: PuzzleForCausalLM) -> float:
    """The share of the multiple-choice questions of `score.task` that a model answers rightly."""
    right: list[bool] = []
    for questions in run.questions():
        tokens_RS = questions.tokens_RS.to(run.device.torch_device)
        with run.device.autocast():
            hidden_RSD = model.model(tokens_RS, use_cache=False).last_hidden_state
            hidden_TD = hidden_RSD[:, :-1].flatten(0, 1)
            metrics_CMT = token_metrics(
                hidden_TD,
                model.lm_head.weight,
                hidden_TD[None],
                model.lm_head.weight,
                tokens_RS[:, 1:].flatten(),
                soft_cap=model.config.final_logit_softcapping,
            )
        loss_T = metrics_CMT[0, METRICS.index("lm_loss")]
        right += questions.right(loss_T.view(len(tokens_RS), -1))
    return sum(right) / len(right)


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
