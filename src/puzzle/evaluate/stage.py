"""Stage `evaluate`: parent, child and uptrained child on test text, and once more served.

Quality on test text, which has chosen nothing (no other stage reads it): KL(parent || model) in
nats per token, LM loss, perplexity, top-1, 5 and 10 (`quality.py`); the same by position up to the
parent's context (`context.py`); local tasks (`skills.py`), tasks of lm-evaluation-harness
(`harness.py`), samples (`samples.py`). Retention is a model's top-1 accuracy over the parent's.
Speed: the uptrained child against the parent, a few steps in turn, beside what the cost model
predicted. The promise is judged by this measurement.

Reads: `child/`, `uptrained/`, the test side of the corpus, the search's answer, costs. Writes:
`results.json`, `<model>.quality.json` (`results.py`), `lm_eval/`.
"""

import contextlib
from functools import partial
from pathlib import Path

from puzzle import artifacts
from puzzle.artifacts import Inputs
from puzzle.assemble import ASSEMBLE, measured
from puzzle.cost.table import read_header, serving_facts
from puzzle.data import tasks
from puzzle.evaluate import context, harness, memory, samples, skills
from puzzle.evaluate.quality import Text, unit_sums
from puzzle.evaluate.results import (
    MODELS,
    RESULTS,
    Model,
    ModelQuality,
    ModelResult,
    PositionCurve,
    Quality,
    Results,
    SampleResult,
    TaskResult,
    quality_path,
)
from puzzle.model import child
from puzzle.model.architecture import Architecture
from puzzle.model.layers import StreamedLayers
from puzzle.model.modeling_puzzle import PuzzleConfig, PuzzleForCausalLM
from puzzle.model.weights import Weights
from puzzle.search import answers
from puzzle.stage import Job, Work, always
from puzzle.training import sharding
from puzzle.uptrain import UPTRAIN


def _facts(job: Job) -> Inputs:
    asked = [job.run.recipe.score.task, *(task.task for task in job.child.evaluate.tasks)]
    files: Inputs = {str(task): tasks.fingerprint(task) for task in asked if task is not None}
    return job.run.data_facts | {"tasks": files} | serving_facts(job)


def _check(job: Job) -> None:
    harness.check(job.child.evaluate.tasks)


def _execute(job: Job, folder: Path) -> None:
    """Quality; processes share the sequences and questions, and the tasks of the harness."""
    run, way = job.run, sharding.shared(memory.way(job))
    with run.parent_streamed() if way == "streamed" else contextlib.nullcontext():
        for model in MODELS:
            _judge(job, folder, model, way)
            sharding.barrier()


def _finish(job: Job, folder: Path) -> None:
    """Speed, by one process, and everything together."""
    job.run.release_models()
    shown = {model: ModelQuality.read(quality_path(folder, model)) for model in MODELS}
    served = measured.measure(job, job.folder(UPTRAIN))
    _results(job, folder, shown, served).write(folder / RESULTS)
    for line in measured.compare(measured.read(job), served):
        job.run.progress.say(f"  {line}")


def _judge(job: Job, folder: Path, name: Model, way: memory.Way) -> None:
    """Everything that one model shows; what an interrupted evaluation has finished stays."""
    run, settings = job.run, job.child.evaluate
    path = quality_path(folder, name)
    left = [task for task in settings.tasks if not harness.result_path(folder, task, name).exists()]
    is_shown, left = sharding.shared((path.exists(), left))
    if is_shown and not left:
        return
    model = _load(job, name, way)
    if not is_shown:
        with context.attending(run, model, context.length(run, job.child.evaluate.context)):
            shown = _shown(job, name, model)
        if sharding.rank() == 0:
            shown.write(path)
    for task in sharding.dealt(left):
        run.progress.say(f"  lm-eval: {task.task}, {name}")
        results = harness.evaluate(run, model, task, settings.batch_sequences)
        artifacts.write_json(harness.result_path(folder, task, name), results)


def _load(job: Job, name: Model, way: memory.Way) -> PuzzleForCausalLM:
    run = job.run
    if name == "parent":
        return run.parent_model
    at, placement = job.folder(ASSEMBLE if name == "child" else UPTRAIN), run.placement
    if way == "streamed":
        config = PuzzleConfig.from_pretrained(at)
        return StreamedLayers(config, partial(Weights, at), placement).whole()
    if way == "host" and name == "child":
        run.make_room()
    return child.load(at, placement.dtype, placement.device, placement.attention)


def _shown(job: Job, name: Model, model: PuzzleForCausalLM) -> ModelQuality:
    run, settings = job.run, job.child.evaluate
    length = context.length(run, settings.context)
    tokens = settings.sequences * run.recipe.corpus.sequence_length
    asked = {"score.task": run.questions("test")} if run.recipe.score.task else {}
    if settings.questions:
        for task, of_task in skills.questions(run, length, settings.questions).items():
            asked[task] = tasks.to_batches(of_task, settings.batch_sequences, length)
    questions = sum(len(batch.answers) for batches in asked.values() for batch in batches)
    title = f"{name} on test text"
    with run.progress.task(title, 2 * tokens, "tokens") as task_bar:
        text = unit_sums(
            run, model, Text.of(run, "test", settings.sequences), settings.batch_sequences
        )
        task_bar.advance(tokens)
        by_position = context.by_position(run, model, length, tokens, task_bar.advance)
    right = {}
    with run.progress.task(f"{name}, {len(asked)} tasks", questions, "questions") as task_bar:
        for task, batches in asked.items():
            right[task] = skills.right_answers(
                run, model, batches, memory.batch_tokens(job, length)
            )
            task_bar.advance(len(right[task]), task)
    written: list[str] = []
    if sharding.rank() == sharding.size() - 1:  # which may have had a batch less
        written = samples.written(run, model, settings.samples, settings.sample_tokens)
    written = sharding.all_of(written)[-1]
    return ModelQuality(text=text, by_position=by_position, right=right, samples=written)


def _results(
    job: Job, folder: Path, shown: dict[Model, ModelQuality], served: measured.Measured
) -> Results:
    run, answer = job.run, answers.read(job)
    architecture = child.read_architecture(job.folder(ASSEMBLE))
    blocks = dict.fromkeys(MODELS, architecture)
    blocks["parent"] = Architecture.of_parent(run.parent.shape)

    def result(name: Model) -> ModelResult:
        elements = blocks[name].kv_elements_per_token(run.parent.shape)
        return ModelResult(
            quality=Quality.of(shown[name].text),
            retention=shown[name].text.retention(shown["parent"].text),
            by_position=PositionCurve.of(shown[name].by_position),
            parameters=blocks[name].parameters(run.parent.shape),
            kv_cache_bytes_per_token=elements * run.parent.dtype.itemsize,
        )

    sources = run.recipe.corpus.sources
    return Results(
        **{name: result(name) for name in MODELS},
        evaluated_tokens=sum(shown["parent"].text.tokens),
        sources=[source.label for source in sources],
        from_parent=any(source.parent for source in sources),
        tasks=_task_results(job, folder, shown),
        samples=_sample_results(job, shown),
        architecture=architecture.names,
        batch_size=answer.batch_size,
        predicted_parent=answer.parent["main"],
        predicted_child=answer.best.predicted["main"],
        served=served,
        costs=read_header(job),
    )


def _task_results(job: Job, folder: Path, shown: dict[Model, ModelQuality]) -> list[TaskResult]:
    run, settings, found = job.run, job.child.evaluate, []
    for task, right in shown["parent"].right.items():
        is_recipes = task == "score.task"
        found.append(
            TaskResult(
                name=str(run.recipe.score.task) if is_recipes else task,
                source="score.task" if is_recipes else "local",
                questions=len(right),
                chance=None if is_recipes else skills.CHANCE[task.split(" ")[0]],
                **{name: skills.accuracy(shown[name].right[task]) for name in MODELS},
            )
        )
    for asked in settings.tasks:
        by_model = {name: harness.metrics(folder, asked, name) for name in MODELS}
        found += [
            TaskResult(
                name=metric,
                source="lm-eval",
                questions=None,
                chance=None,
                **{name: by_model[name][metric] for name in MODELS},
            )
            for metric in by_model["parent"]
        ]
    return found


def _sample_results(job: Job, shown: dict[Model, ModelQuality]) -> list[SampleResult]:
    settings = job.child.evaluate
    originals = samples.originals(job.run, settings.samples, settings.sample_tokens)
    return [
        SampleResult(
            prompt=original.prompt,
            text=original.text,
            **{name: shown[name].samples[index] for name in MODELS},
        )
        for index, original in enumerate(originals)
    ]


WORK = Work(
    facts=_facts,
    execute=_execute,
    need=memory.need,
    check=_check,
    is_shared=always,
    finish=_finish,
)
