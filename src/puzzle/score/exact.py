"""Exact scores: a replaced block starts from the parent's activations and runs the layers after it.

The parent's activations at every block input are computed once per shard of sequences; the blocks
of a layer go through the layers after it together, batched to `tokens_per_pass`, and wait for one
another before the head. Logits are chunked over tokens; the parent's are computed anew for each
chunk, once for all blocks that have waited.

Shape legend: C candidates, M metrics, B sequences, S positions, D hidden, T = B * (S - 1).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from puzzle.data import tasks
from puzzle.model.modeling_puzzle import LayerContext, PuzzleForCausalLM
from puzzle.run import Run
from puzzle.score.modules import LayerBlocks
from puzzle.score.results import Sums
from puzzle.training.losses import METRICS, token_metrics

HELD_SHARE = 0.05  # of the memory: inputs of the head that wait

N = TypeVar("N")  # what an output is known by


@dataclass(frozen=True)
class Shard:
    """Sequences that are scored together: of text, or the rows of questions."""

    name: str
    tokens_BS: torch.Tensor
    questions: tasks.QuestionBatch | None = None


@torch.no_grad()
def parent_states(
    run: Run, parent: PuzzleForCausalLM, tokens_BS: torch.Tensor
) -> list[torch.Tensor]:
    """The parent's input of every layer and its last output: L + 1 host tensors [B, S, D].

    On a GPU they are on their way there when this returns: only the same device may read them.
    """
    with run.device.autocast():
        hidden, context = parent.model.embed(tokens_BS.to(run.device.torch_device))
        states = [run.device.to_host(hidden)]
        for module in parent.model.layers:
            hidden = module(hidden, **context)
            states.append(run.device.to_host(hidden))
        return states


@torch.no_grad()
def score_layer(
    run: Run,
    parent: PuzzleForCausalLM,
    layer: int,
    blocks: LayerBlocks,
    states: Sequence[torch.Tensor],
    shard: Shard,
) -> dict[str, Sums]:
    """Sums over the tokens of a shard of every metric, by name of the layer's blocks.

    Args:
        run: for device and settings.
        parent: in memory.
        layer: whose block is replaced.
        blocks: the replacements.
        states: of `parent_states` on this shard.
        shard: the text or questions.
    """
    device = run.device.torch_device
    tokens_BS = shard.tokens_BS.to(device)
    x_BSD = states[layer].to(device, non_blocking=True)
    per_pass = max(1, run.recipe.score.tokens_per_pass // tokens_BS.numel())
    results: dict[str, Sums] = {}
    with run.device.autocast():
        final_BSD = parent.model.norm(states[-1].to(device, non_blocking=True))
        _, context = parent.model.embed(tokens_BS[:1])  # of a batch of one: fits any number
        after = list(parent.model.layers[layer + 1 :])
        suffix = Suffix(parent, after, context, final_BSD, tokens_BS)
        outputs = suffix.finals(blocks.outputs(x_BSD, context), per_pass)
        held = max(1, int(HELD_SHARE * run.device.memory_bytes / x_BSD.nbytes))
        while pending := list(itertools.islice(outputs, held)):
            metrics_CMBS = suffix.metrics([final for _, final in pending])
            for (block, _), metrics_MBS in zip(pending, metrics_CMBS, strict=True):
                if shard.questions is None:
                    results[block.name] = text_sums(metrics_MBS)
                else:
                    results[block.name] = question_sums(shard.questions, metrics_MBS)
    return results


@dataclass(frozen=True)
class Suffix:
    """What follows a layer: the layers after it, the parent's head, and the parent's side."""

    parent: PuzzleForCausalLM
    layers: Sequence[Callable[..., torch.Tensor]]
    context: LayerContext
    final_BSD: torch.Tensor  # the parent's, after the last norm
    tokens_BS: torch.Tensor

    def finals(
        self, outputs: Iterable[tuple[N, torch.Tensor]], per_pass: int
    ) -> Iterator[tuple[N, torch.Tensor]]:
        """Run outputs [B, S, D] of the layer on, several at once: the head's inputs [T, D]."""
        outputs = iter(outputs)
        while pending := list(itertools.islice(outputs, per_pass)):
            hidden = torch.cat([output for _, output in pending])
            for layer in self.layers:
                hidden = layer(hidden, **self.context)
            parts = self.parent.model.norm(hidden).chunk(len(pending))
            for (block, _), normed_BSD in zip(pending, parts, strict=True):
                yield block, normed_BSD[:, :-1].flatten(0, 1)

    def metrics(self, finals: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of several inputs [T, D] of the head: float64 [C, M, B, S - 1].

        The parent's logits are computed once for all of them.
        """
        count, (B, S) = len(finals), self.tokens_BS.shape
        head = self.parent.lm_head.weight
        metrics_CMT = token_metrics(
            self.final_BSD[:, :-1].flatten(0, 1),
            head,
            finals,
            head,
            self.tokens_BS[:, 1:].flatten(),
            soft_cap=self.parent.config.final_logit_softcapping,
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
