"""Stage `assemble`: put the chosen blocks together, save the child, serve it, judge the promise.

The child's weights are the parent's embedding, final norm and head, and per layer the library's
subblocks. It is then measured against the parent on the engine that the costs came from
(`measured.py`). What becomes of a miss is in `pipeline.make_child`.

Reads: the parent, the library, the search's answer. Writes: `child/` (a Hugging Face folder) and
`child/measured.json`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from puzzle.artifacts import Inputs
from puzzle.assemble import measured
from puzzle.cost import table
from puzzle.cost.table import serving_facts
from puzzle.engines import ENGINE_OVERHEAD_BYTES
from puzzle.library import weights
from puzzle.model import card, child
from puzzle.model.architecture import Architecture
from puzzle.run import Run
from puzzle.search import answers, finalists, tried
from puzzle.stage import Bytes, Effort, Job, Need, Work

ENGINE_START_S, ENGINE_RESTART_S = 10.0, 3.0
BATCHES_PER_START = 1.5  # of each side, about: the turns that one start of the engines shows
BATCH_OVERHEAD = 3.0  # a served batch takes so much longer than its matrix products


class ChildState(Mapping[str, torch.Tensor]):
    """The child's weights by name."""

    def __init__(self, run: Run, architecture: Architecture) -> None:
        parent = run.parent.weights()
        self._state = {name: parent[name] for name in parent if not _is_layer(name)}
        for index, block in enumerate(architecture):
            prefix = f"model.layers.{index}."
            names = [name for name in parent if name.startswith(prefix)]
            layer_state = {name.removeprefix(prefix): parent[name] for name in names}
            state = weights.read_block(run, index, block, layer_state)
            self._state |= {prefix + name: tensor for name, tensor in state.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _is_layer(name: str) -> bool:
    return name.startswith("model.layers.")


def _facts(job: Job) -> Inputs:
    return serving_facts(job)


def _execute(job: Job, folder: Path) -> None:
    run, architecture = job.run, answers.read(job).best.architecture
    config = run.parent.child_config(architecture)
    state = ChildState(run, architecture)
    model_card = card.text(run.recipe.parent, run.parent, architecture)
    child.save(folder, config, architecture, state, run.parent.folder, model_card)
    is_free = job.child.search.architecture is None and answers.read(job).final is None
    tries = 1 + len(tried.Tries.of(job).children)
    may_try_another = is_free and tries < job.child.search.attempts
    result = measured.measure(job, folder, known=measured.known(job), settles=may_try_another)
    result.write(folder / measured.MEASURED)
    if result.known_before:
        run.progress.say("  this architecture was measured before and is not served again")
    for line in measured.describe(result):
        run.progress.say(f"  {line}")
    if result.verdict == "met" and result.gives_away and is_free:
        run.progress.say("  more than 2 % beyond what was asked: `puzzle run` and `puzzle child`")
        run.progress.say("  go on and search for a child that keeps more quality")


def serving_need(job: Job) -> Need:
    """What measuring parent and child takes: side by side where that fits, else in turn.

    Nothing of this machine's memory where costs are modelled.
    """
    run, scenario = job.run, job.place.cost.scenario
    parameters = Architecture.of_parent(run.parent.shape).parameters(run.parent.shape)
    tokens = scenario.batch_size * (scenario.input_length + scenario.output_length)
    model_bytes = parameters * run.parent.dtype.itemsize
    batch_s = BATCH_OVERHEAD * 2 * parameters * tokens / run.device.training_flops_per_s
    cache = Architecture.of_parent(run.parent.shape).kv_elements_per_token(run.parent.shape)
    cache_bytes = cache * tokens * run.parent.dtype.itemsize
    served = Bytes(
        weights=model_bytes / scenario.tensor_parallel,
        activations=ENGINE_OVERHEAD_BYTES,
        cache=cache_bytes / scenario.tensor_parallel,
    )
    is_beside = not served.times(2).lacking(run.device.memory)
    served_s = ENGINE_START_S
    served_s += job.place.cost.starts * (ENGINE_RESTART_S + 2 * BATCHES_PER_START * batch_s)
    is_modelled = job.place.cost.engine == "roofline" or table.are_from_elsewhere(job)
    return Need(
        memory=Bytes() if is_modelled else served.times(2 if is_beside else 1),
        chosen="" if is_modelled else f"both served {'side by side' if is_beside else 'in turn'}",
        instead="raise cost.scenario.tensor_parallel or lower cost.scenario.batch_size",
        disk_bytes=model_bytes,
        effort=Effort(beside_s=0.0 if is_modelled else served_s),
    )


def _need(job: Job) -> Need:
    """A child that gives away speed, or misses, is followed by another about every second time."""
    serving = serving_need(job)
    return replace(serving, effort=serving.effort.times(1.5 * finalists.rounds(job)))


WORK = Work(facts=_facts, execute=_execute, need=_need)
