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

from pathlib import Path

from puzzle import artifacts
from puzzle.artifacts import Inputs
from puzzle.assemble import ASSEMBLE, measured
from puzzle.assemble.stage import serving_need
from puzzle.cost.table import read_header, serving_facts
from puzzle.data import tasks
from puzzle.evaluate import context, harness, samples, skills
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
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.search import answers
from puzzle.stage import Effort, Job, Need, Work
from puzzle.training.losses import CHUNK_ELEMENTS
from puzzle.uptrain import UPTRAIN
from puzzle.uptrain.memory import most_parameters

WRITTEN_LAYER_S = 1e-3  # a layer for one token of one sequence, about (samples)


def _facts(job: Job) -> Inputs:
    asked = [job.run.recipe.score.task, *(task.task for task in job.child.evaluate.tasks)]
    files: Inputs = {str(task): tasks.fingerprint(task) for task in asked if task is not None}
    return job.run.data_facts | {"tasks": files} | serving_facts(job)


def _check(job: Job) -> None:
    harness.check(job.child.evaluate.tasks)


def _execute(job: Job, folder: Path) -> None:
    for model in MODELS:
        _judge(job, folder, model)
    job.run.release_models()
    shown = {model: ModelQuality.read(quality_path(folder, model)) for model in MODELS}
    served = measured.measure(job, job.folder(UPTRAIN))
    _results(job, folder, shown, served).write(folder / RESULTS)
    for line in measured.compare(measured.read(job), served):
        job.run.progress.say(f"  {line}")


def _judge(job: Job, folder: Path, name: Model) -> None:
    """Everything that one model shows; what an interrupted evaluation has finished stays."""
    run, settings = job.run, job.child.evaluate
    path = quality_path(folder, name)
    left = [task for task in settings.tasks if not harness.result_path(folder, task, name).exists()]
    if path.exists() and not left:
        return
    model = _load(job, name)
    if not path.exists():
        with context.attending(run, model, context.length(run, job.child.evaluate.context)):
            _shown(job, name, model).write(path)
    for task in left:
        run.progress.say(f"  lm-eval: {task.task}, {name}")
        results = harness.evaluate(run, model, task, settings.batch_sequences)
        artifacts.write_json(harness.result_path(folder, task, name), results)


def _load(job: Job, name: Model) -> PuzzleForCausalLM:
    run = job.run
    if name == "parent":
        return run.parent_model
    run.make_room(most_parameters(job) * run.placement.dtype.itemsize + _batch_bytes(job))
    at = job.folder(ASSEMBLE if name == "child" else UPTRAIN)
    return child.load(at, run.placement.dtype, run.device.torch_device, run.placement.attention)


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
            right[task] = skills.right_answers(run, model, batches, _batch_tokens(job, length))
            task_bar.advance(len(right[task]), task)
    written = samples.written(run, model, settings.samples, settings.sample_tokens)
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


def _batch_tokens(job: Job, length: int) -> int:
    """The most that pass a model at once: a batch of text, or one sequence of the context."""
    return max(job.child.evaluate.batch_sequences * job.run.recipe.corpus.sequence_length, length)


def _batch_bytes(job: Job) -> float:
    """Of a batch that goes through a layer; then of four copies of a chunk of logits, and both
    sides of the cosine in float32.
    """
    run, shape = job.run, job.run.parent.shape
    tokens = _batch_tokens(job, context.planned(run, job.child.evaluate.context))
    passing = shape.passing_elements * run.placement.dtype.itemsize
    judged = 5 * 4 * shape.hidden_size
    logits = 4.0 * 4 * CHUNK_ELEMENTS[run.device.type]
    return max(tokens * passing, tokens * judged + logits)


def _need(job: Job) -> Need:
    run, settings, shape = job.run, job.child.evaluate, job.run.parent.shape
    serving, row = serving_need(job), run.recipe.corpus.sequence_length
    parameters = Architecture.of_parent(shape).parameters(shape)
    length = context.planned(run, settings.context)
    text = 2 * settings.sequences * row  # and once more by position
    tokens = text + settings.questions * skills.tokens_per_question(row, length)
    read = len(MODELS) * tokens + (len(MODELS) - 1) * text  # the parent beside each child
    written = len(MODELS) * settings.samples * settings.sample_tokens * shape.num_hidden_layers
    element, memory = run.placement.dtype.itemsize, run.device.memory
    models = [most_parameters(job) * element + _batch_bytes(job), parameters * element]
    if not memory.is_shared and memory.lacks(sum(models), 0.0):  # as in `Run.make_room`
        models[1] = (shape.constant_parameters + 2 * shape.parameters(shape.widest_block)) * element
    return Need(
        tokens=tokens,
        flops=2.0 * read * parameters,
        memory_bytes=max(sum(models), serving.memory_bytes),
        instead=serving.instead,
        disk_bytes=1e6,
        effort=Effort(
            forward=float(read) * (parameters - shape.constant_parameters),
            judged=len(MODELS) * tokens,
            beside_s=serving.effort.beside_s + written * WRITTEN_LAYER_S,
        ),
    )


WORK = Work(facts=_facts, execute=_execute, need=_need, check=_check)
