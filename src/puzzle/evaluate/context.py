"""Quality by position: what a child loses where much text stands before a token.

A child that replaces attention may be as good as ever on short sequences and useless on long ones:
the paper's own keeps 98.65 % at 4K tokens and 14.86 % at 64K. So KL and LM loss are measured on
sequences as long as the parent's context, in buckets of positions that double in width.

Shape legend: N sequences, S positions, K buckets.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch

from puzzle.data.sequences import Sequences
from puzzle.evaluate.bootstrap import Buckets, UnitSums
from puzzle.evaluate.quality import Text, group_sums
from puzzle.model import child
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.run import Run
from puzzle.training.losses import METRICS

FIRST_BUCKET = 64  # positions; each further bucket ends at twice the position
MOST_CONTEXT = 32_768  # tokens, where the recipe does not say how many
LEAST_SEQUENCES = 8  # as long as the context, where the recipe does not say how long


def length(run: Run, asked: int | None) -> int:
    """The sequences' length in tokens: as asked, or else the parent's context.

    Less where the test text does not fill `LEAST_SEQUENCES` of them; always a multiple of the
    corpus's sequences, which are joined.
    """
    return _length(run, asked, len(run.corpus["test"]) * run.corpus["test"].sequence_length)


def planned(run: Run, asked: int | None) -> int:
    """The same where there is no test text yet: as if there were as much as the recipe allows."""
    return _length(run, asked, run.recipe.corpus.held_out_tokens // 2)


def _length(run: Run, asked: int | None, tokens: int) -> int:
    row = run.recipe.corpus.sequence_length
    if asked is not None:
        return max(row, asked // row * row)
    longest = int(run.parent.hf_config.max_position_embeddings)
    return max(row, min(longest, MOST_CONTEXT, tokens // LEAST_SEQUENCES) // row * row)


@contextlib.contextmanager
def attending(run: Run, model: PuzzleForCausalLM, context: int) -> Iterator[None]:
    """Parent and `model` with the attention that is best for so many tokens.

    They were loaded for the corpus's sequences. Afterwards the parent is as it was: modules of
    other stages take their masks from it.
    """
    parent = run.parent_model
    before = parent.config._attn_implementation
    for one in (parent, model):
        wanted = run.device.attention_for(context)
        one.set_attn_implementation(child.attention_for(one.config, wanted))
    try:
        yield
    finally:
        parent.set_attn_implementation(before)


def ends(context: int) -> list[int]:
    """Where the buckets of so many positions end."""
    found = [min(FIRST_BUCKET, context)]
    while found[-1] < context:
        found.append(min(2 * found[-1], context))
    return found


def joined(run: Run, context: int) -> Sequences:
    """The test text as sequences of that many tokens. Raises `UserError` where it fills none."""
    side = run.corpus["test"]
    return side.view(join=context // side.sequence_length)


def by_position(
    run: Run,
    model: PuzzleForCausalLM,
    context: int,
    tokens: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Buckets:
    """KL and LM loss by position, on about `tokens` tokens of test text."""
    side = joined(run, context)
    tokens_NS = side.head(max(1, tokens // context))
    K, N = len(ends(context)), len(tokens_NS)
    of_S = torch.bucketize(torch.arange(context), torch.tensor(ends(context)), right=True)
    counted_NS = side.head_counted(N)
    groups_NS = torch.where(counted_NS, torch.arange(N)[:, None] * K + of_S, N * K)
    sums_MG, tokens_G = group_sums(run, model, Text(tokens_NS, groups_NS), 1, advance)
    sums_MNK, tokens_NK = sums_MG[:, : N * K].view(-1, N, K), tokens_G[: N * K].view(N, K)
    return Buckets(
        ends=ends(context),
        sums=[
            UnitSums(
                units=list(range(N)),
                tokens=tokens_NK[:, bucket].tolist(),
                metrics={
                    name: sums_MNK[METRICS.index(name), :, bucket].tolist()
                    for name in ("kl", "lm_loss")
                },
            )
            for bucket in range(K)
        ],
    )
