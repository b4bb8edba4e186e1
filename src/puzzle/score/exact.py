"""Exact scores: a replaced block starts from the parent's activations and runs the layers after it.

The parent's activations at every block input are computed once per shard of sequences; the blocks
of a layer, or of several, go through the layers after it together, batched to `tokens_per_pass`:
all batches pass a layer before the next one, so that a layer may be read from its files. They wait
for one another before the head. Logits are chunked over tokens; the parent's are computed anew for
each chunk, once for all blocks that have waited.

Shape legend: C candidates, M metrics, B sequences, S positions, D hidden, T = B * (S - 1).
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from puzzle.data import tasks
from puzzle.model.layers import ParentLayers
from puzzle.model.modeling_puzzle import LayerContext, PuzzleDecoderLayer
from puzzle.run import Run
from puzzle.score.modules import LayerBlocks
from puzzle.score.results import Sums
from puzzle.training.losses import METRICS, token_metrics

LoadBlocks = Callable[[PuzzleDecoderLayer], LayerBlocks]  # from the parent's layer in that place
N = TypeVar("N")  # what an output is known by


@dataclass(frozen=True)
class Shard:
    """Sequences that are scored together: of text, or the rows of questions."""

    name: str
    tokens_BS: torch.Tensor
    questions: tasks.QuestionBatch | None = None


@torch.no_grad()
def parent_states(
    run: Run, parent: ParentLayers, tokens_BS: torch.Tensor
) -> tuple[list[torch.Tensor], LayerContext]:
    """The parent's input of every layer and its last output: L + 1 host tensors [B, S, D].

    On a GPU they are on their way there when this returns: only the same device may read them. The
    context is that of a batch of one, which fits any other.
    """
    with run.device.autocast():
        hidden, context = parent.embed(tokens_BS)
        states = [run.device.to_host(hidden)]
        for index in range(len(parent)):
            with parent.layer(index) as module:
                hidden = module(hidden, **context)
            states.append(run.device.to_host(hidden))
        _, context = parent.embed(tokens_BS[:1])
        return states, context


@dataclass(frozen=True)
class Scorer:
    """The scores of replaced blocks on one shard."""

    run: Run
    parent: ParentLayers
    shard: Shard
    states: Sequence[torch.Tensor]  # of `parent_states` on this shard
    context: LayerContext

    @torch.no_grad()
    def score(self, replaced: Mapping[int, LoadBlocks]) -> dict[int, dict[str, Sums]]:
        """Sums over the shard's tokens of every metric, by layer and block name.

        Args:
            replaced: by layer, what loads the blocks that take its place, one at a time.
        """
        device = self.run.device.torch_device

        def outputs(layer: int) -> Iterator[tuple[tuple[int, str], torch.Tensor]]:
            x_BSD = self.states[layer].to(device, non_blocking=True)
            with self.parent.layer(layer) as module:
                for block, output in replaced[layer](module).outputs(x_BSD, self.context):
                    yield (layer, block.name), output

        results: dict[int, dict[str, Sums]] = {layer: {} for layer in replaced}
        with self.run.device.autocast():
            last_BSD = self.states[-1].to(device, non_blocking=True)
            suffix = Suffix(
                self.parent,
                self.parent,
                self.context,
                self.parent.norm(last_BSD),
                self.shard.tokens_BS.to(device),
            )
            per_pass = self.run.recipe.score.tokens_per_pass
            finals = list(suffix.finals({layer: outputs(layer) for layer in replaced}, per_pass))
            metrics_CMBS = suffix.metrics([final for _, final in finals])
        for ((layer, name), _), metrics_MBS in zip(finals, metrics_CMBS, strict=True):
            if self.shard.questions is None:
                results[layer][name] = text_sums(metrics_MBS)
            else:
                results[layer][name] = question_sums(self.shard.questions, metrics_MBS)
        return results


class Layers(Protocol):
    """The layers of a model, each there while it is used."""

    def __len__(self) -> int: ...

    def layer(self, index: int) -> contextlib.AbstractContextManager[Callable[..., torch.Tensor]]:
        """What layer `index` does."""
        ...


@dataclass(frozen=True)
class Suffix:
    """What follows a layer: the layers after it, the parent's head, and the parent's side."""

    layers: Layers
    parent: ParentLayers
    context: LayerContext
    final_BSD: torch.Tensor  # the parent's, after the last norm
    tokens_BS: torch.Tensor

    def finals(
        self, outputs: Mapping[int, Iterable[tuple[N, torch.Tensor]]], tokens_per_pass: int
    ) -> Iterator[tuple[N, torch.Tensor]]:
        """Run outputs [B, S, D] of some layers on to the head, whose inputs [T, D] come.

        Several of a layer's go on together, up to `tokens_per_pass`. All of them pass a layer
        before the next one, which may have to be read first.
        """
        per_pass = max(1, tokens_per_pass // self.tokens_BS.numel())
        passing: list[tuple[list[N], torch.Tensor]] = []
        for index in range(min(outputs), len(self.layers)):
            with contextlib.ExitStack() as stack:
                if passing:
                    run_layer = stack.enter_context(self.layers.layer(index))
                    for place, (names, hidden) in enumerate(passing):
                        passing[place] = names, run_layer(hidden, **self.context)
                entering = iter(outputs.get(index, ()))
                while pending := list(itertools.islice(entering, per_pass)):
                    names = [name for name, _ in pending]
                    passing.append((names, torch.cat([output for _, output in pending])))
        passing.reverse()
        while passing:
            names, hidden = passing.pop()
            parts = self.parent.norm(hidden).chunk(len(names))
            for name, normed_BSD in zip(names, parts, strict=True):
                yield name, normed_BSD[:, :-1].flatten(0, 1)

    def metrics(self, finals: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of several inputs [T, D] of the head: float64 [C, M, B, S - 1].

        The parent's logits are computed once for all of them.
        """
        count, (B, S) = len(finals), self.tokens_BS.shape
        head = self.parent.head_VD
        metrics_CMT = token_metrics(
            self.final_BSD[:, :-1].flatten(0, 1),
            head,
            finals,
            head,
            self.tokens_BS[:, 1:].flatten(),
            soft_cap=self.parent.soft_cap,
        )
        return metrics_CMT.view(count, len(METRICS), B, S - 1).double()


def text_sums(metrics_MBS: torch.Tensor) -> Sums:
    """Sums over tokens, and of the squares of every sequence's mean."""
    squares_M = metrics_MBS.mean(dim=-1).square().sum(dim=-1)
    sums, squares = torch.stack([metrics_MBS.sum(dim=(1, 2)), squares_M]).tolist()
    return Sums(
        sums=dict(zip(METRICS, sums, strict=True)),
        squares=dict(zip(METRICS, squares, strict=True)),
        tokens=metrics_MBS[0].numel(),
        sequences=metrics_MBS.shape[1],
    )


def question_sums(questions: tasks.QuestionBatch, metrics_MRT: torch.Tensor) -> Sums:
    """Right answers, which are their own squares."""
    right = float(sum(questions.right(metrics_MRT[METRICS.index("lm_loss")])))
    sums = {"task": right}
    count = len(questions.answers)
    return Sums(sums=sums, squares=dict(sums), tokens=0, sequences=0, questions=count)
