"""A model's quality on held-out text against the parent, added up by document.

With fewer documents than `LEAST_DOCUMENTS` the sequences stand in for them.

Shape legend: N sequences, B of a batch, S positions, T = B * (S - 1) tokens, M metrics, G groups.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from puzzle.data.sequences import Split
from puzzle.evaluate.bootstrap import UnitSums
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.run import Run
from puzzle.training import sharding
from puzzle.training.losses import METRICS, token_metrics

LEAST_DOCUMENTS = 10
NOT_COUNTED = -1


class Text(NamedTuple):
    """Held-out sequences and the unit that each of their tokens belongs to, both int64 [N, S].

    The unit is `NOT_COUNTED` where a token is read but not judged: what a chat's user has said.
    """

    tokens_NS: torch.Tensor
    units_NS: torch.Tensor

    @classmethod
    def of(cls, run: Run, split: Split, count: int) -> "Text":
        """At most `count` sequences of one side of the corpus."""
        side = run.corpus[split]
        tokens_NS, units_NS = side.head(count), side.head_documents(count)
        if len(units_NS.unique()) < LEAST_DOCUMENTS:
            units_NS = torch.arange(len(tokens_NS))[:, None].expand_as(tokens_NS)
        return cls(tokens_NS, units_NS.where(side.head_counted(count), NOT_COUNTED))


def unit_sums(run: Run, model: PuzzleForCausalLM, text: Text, batch_sequences: int) -> UnitSums:
    """Every metric of `model` against the parent, summed by unit."""
    units, groups_NS = text.units_NS.unique(return_inverse=True)
    counted = units != NOT_COUNTED
    sums_MG, tokens_G = group_sums(run, model, Text(text.tokens_NS, groups_NS), batch_sequences)
    seen = counted & (tokens_G > 0)  # a document's first token may be all that is there of it
    return UnitSums(
        units=units[seen].tolist(),
        tokens=tokens_G[seen].tolist(),
        metrics=dict(zip(METRICS, sums_MG[:, seen].tolist(), strict=True)),
    )


@torch.no_grad()
def group_sums(
    run: Run,
    model: PuzzleForCausalLM,
    text: Text,
    batch_sequences: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of every metric, float64 [M, G], and counts of tokens, int64 [G].

    `text.units_NS` numbers the groups from 0. A token belongs to the group of its own position, and
    is predicted from those before it. `advance` is told the tokens of every batch. Processes of a
    group share the batches.
    """
    count = int(text.units_NS.max()) + 1
    sums_MG = torch.zeros(len(METRICS), count, dtype=torch.float64)
    tokens_G = torch.zeros(count, dtype=torch.int64)
    parent = run.parent_model
    batches = (part.split(batch_sequences) for part in text)
    for rows_BS, groups_BS in sharding.dealt(list(zip(*batches, strict=True))):
        tokens_BS = rows_BS.to(run.device.torch_device)
        with run.device.autocast():
            parent_BSD = parent.model(tokens_BS, use_cache=False).last_hidden_state
            model_BSD = parent_BSD
            if model is not parent:
                model_BSD = model.model(tokens_BS, use_cache=False).last_hidden_state
            metrics_CMT = token_metrics(
                parent_BSD[:, :-1].flatten(0, 1),
                parent.lm_head.weight,
                model_BSD[None, :, :-1].flatten(1, 2),
                model.lm_head.weight,
                tokens_BS[:, 1:].flatten(),
                soft_cap=parent.config.final_logit_softcapping,
            )
        of_T = groups_BS[:, 1:].flatten()
        sums_MG.index_add_(1, of_T, metrics_CMT[0].double().cpu())
        tokens_G.index_add_(0, of_T, torch.ones_like(of_T))
        advance(rows_BS.numel())
    return sharding.summed(sums_MG), sharding.summed(tokens_G)
