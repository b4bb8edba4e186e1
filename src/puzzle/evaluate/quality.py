"""A model's quality on held-out text, document by document.

With fewer documents than `LEAST_DOCUMENTS` the sequences stand in for them.

Shape legend: N sequences, B of a batch, S positions, T = B * (S - 1) tokens, M metrics, U units
(documents or sequences).
"""

from typing import NamedTuple

import torch

from puzzle.data.sequences import Split
from puzzle.evaluate.bootstrap import UnitSums
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.run import Run
from puzzle.training.losses import METRICS, token_metrics

LEAST_DOCUMENTS = 10


class Text(NamedTuple):
    """Held-out sequences and the unit that each of their tokens belongs to, both int64 [N, S]."""

    tokens_NS: torch.Tensor
    units_NS: torch.Tensor

    @classmethod
    def of(cls, run: Run, split: Split, count: int) -> "Text":
        """At most `count` sequences of one side of the corpus."""
        side = run.corpus[split]
        tokens_NS, units_NS = side.head(count), side.head_documents(count)
        if len(units_NS.unique()) < LEAST_DOCUMENTS:
            units_NS = torch.arange(len(tokens_NS))[:, None].expand_as(tokens_NS)
        return cls(tokens_NS, units_NS)


@torch.no_grad()
def unit_sums(run: Run, model: PuzzleForCausalLM, text: Text, batch_sequences: int) -> UnitSums:
    """Every metric of `model` against the parent, summed by unit."""
    units, index_NS = text.units_NS.unique(return_inverse=True)
    sums_MU = torch.zeros(len(METRICS), len(units), dtype=torch.float64)
    tokens_U = torch.zeros(len(units), dtype=torch.int64)
    parts = zip(text.tokens_NS.split(batch_sequences), index_NS.split(batch_sequences), strict=True)
    parent = run.parent_model
    for rows_BS, index_BS in parts:
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
        of_T = index_BS[:, 1:].flatten()  # a token counts for the document that it is of
        sums_MU.index_add_(1, of_T, metrics_CMT[0].double().cpu())
        tokens_U.index_add_(0, of_T, torch.ones_like(of_T))
    seen = tokens_U > 0  # a document's first token may be all that is there of it
    return UnitSums(
        units=units[seen].tolist(),
        tokens=tokens_U[seen].tolist(),
        metrics=dict(zip(METRICS, sums_MU[:, seen].tolist(), strict=True)),
    )


@torch.no_grad()
def right_answers(run: Run, model: PuzzleForCausalLM) -> list[bool]:
    """Of each question of `score.task` that chose nothing, whether a model answers it rightly."""
    right: list[bool] = []
    for questions in run.questions("test"):
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
    return right
