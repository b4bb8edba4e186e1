"""Bugs that a CPU does not notice, planted to see that the harness does."""

import contextlib
from unittest import mock

import torch

from puzzle.device import Device
from puzzle.library.bld import VariantTrainer
from puzzle.model.modeling_puzzle import PuzzleDecoderLayer
from puzzle.score.exact import Suffix
from puzzle.score.modules import LayerBlocks
from puzzle.training import losses
from puzzle.uptrain.gkd import Pair


def _around(owner: type, name: str, change) -> contextlib.AbstractContextManager:
    """`change(original, *arguments)` in the place of a method."""
    original = getattr(owner, name)

    def changed(*args, **kwargs):
        return change(original, *args, **kwargs)

    return mock.patch.object(owner, name, changed)


def tokens_on_the_host() -> contextlib.AbstractContextManager:
    """Uptraining forgets to bring its tokens to the device."""
    return _around(Pair, "forward", lambda original, pair, tokens, *a, **k: original(
        pair, tokens.cpu(), *a, **k))  # fmt: skip


def sums_on_the_host() -> contextlib.AbstractContextManager:
    """Scores are added up on the CPU."""
    return _around(Suffix, "metrics", lambda original, *args: original(*args) + torch.zeros(1))


def a_look_at_every_step() -> contextlib.AbstractContextManager:
    """Every BLD step of every variant looks at its loss."""

    def step(original, *args):
        loss = original(*args)
        float(loss)
        return loss

    return _around(VariantTrainer, "train_step", step)


def a_look_at_every_layer() -> contextlib.AbstractContextManager:
    """Every layer checks what comes out of it."""

    def forward(original, *args, **kwargs):
        hidden = original(*args, **kwargs)
        assert bool(hidden.isfinite().all())
        return hidden

    return _around(PuzzleDecoderLayer, "forward", forward)


def unpinned_states() -> contextlib.AbstractContextManager:
    """The parent's activations are kept in ordinary host memory."""
    return mock.patch.object(Device, "to_host", lambda device, tensor: tensor.cpu())


def a_head_that_is_cast_for_every_chunk() -> contextlib.AbstractContextManager:
    """Logits are computed from a float32 copy of the whole head, chunk by chunk."""

    def logits(hidden_TD, head_VD, soft_cap=None):
        return hidden_TD.float() @ head_VD.float().T

    return mock.patch.object(losses, "_logits", logits)


def outputs_that_stay() -> contextlib.AbstractContextManager:
    """Every block's output is kept until the end."""
    kept = []

    def outputs(original, *args):
        for block, output in original(*args):
            kept.append(output)
            yield block, output

    return _around(LayerBlocks, "outputs", outputs)


BUGS = {
    bug.__name__: bug
    for bug in (
        tokens_on_the_host,
        sums_on_the_host,
        a_look_at_every_step,
        a_look_at_every_layer,
        unpinned_states,
        a_head_that_is_cast_for_every_chunk,
        outputs_that_stay,
    )
}
