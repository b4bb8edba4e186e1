"""Muon: the step of a matrix is its momentum, made orthogonal (Jordan et al. 2024).

All directions of a matrix learn at one rate then, not only those in which gradients are large. The
step is scaled to the root mean square of AdamW's (Liu et al. 2025, "Muon is scalable for LLM
training", section 2.2), so rates of the two compare. What is no matrix of a layer (embedding, head,
norms) learns by AdamW beside it.

`torch.optim.Muon` computes the same; of a sharded matrix every process would do all of it, and
gather for each of its fifteen products. Here matrices are dealt to processes: each is gathered
once, made orthogonal by one of them, and sent back. Where momenta are on the host they stay there,
and products are those of the device.

Shape legend: R rows, C columns of a matrix.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from puzzle.training import checkpoint, sharding

MOMENTUM = 0.95
COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # of the quintic, Jordan's: steep at 0, about 1 from .01 on
STEPS = 5  # of Newton-Schulz
ADAMW_RMS = 0.2  # of AdamW's step, about, as a share of its rate
LEAST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Steps matrices; their rate is that of `param_groups`, and nothing decays."""

    def __init__(
        self, matrices: Iterable[torch.Tensor], products: torch.dtype, device: torch.device
    ) -> None:
        """Ready to step, at a rate of 0.

        Args:
            matrices: float32 [R, C] each, whole or sharded by rows, anywhere.
            products: dtype in which they are made orthogonal.
            device: where that is done.
        """
        super().__init__(matrices, {"lr": 0.0})
        self.products, self.device = products, device

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step those that have a gradient. Every process of a group must take part."""
        matrices = [m for g in self.param_groups for m in g["params"] if m.grad is not None]
        if any(isinstance(matrix, DTensor) for matrix in matrices):
            self._step_sharded(matrices)
            return
        for matrix in matrices:
            self._move(matrix, orthogonal(self._ahead(matrix).to(self.device)))

    def _ahead(self, matrix: torch.Tensor) -> torch.Tensor:
        """The momentum, looked at one step ahead (Nesterov), in the dtype of products [R, C]."""
        gradient, state = matrix.grad, self.state[matrix]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum"], MOMENTUM).to(self.products)

    def _move(self, matrix: torch.Tensor, step_RC: torch.Tensor) -> None:
        scale = ADAMW_RMS * max(matrix.shape) ** 0.5
        step_RC = step_RC.to(device=matrix.device, dtype=matrix.dtype)
        matrix.add_(step_RC, alpha=-self.param_groups[0]["lr"] * scale)

    def _step_sharded(self, matrices: Sequence[torch.Tensor]) -> None:
        """Gather all, each for its owner; make one's own orthogonal; send them to all."""
        owners = _owners(matrices, sharding.size())
        own: dict[int, torch.Tensor] = {}
        for index, matrix in enumerate(matrices):
            whole_RC = checkpoint.gathered(self._ahead(matrix))
            if owners[index] == sharding.rank():
                own[index] = whole_RC
        for index in own:
            own[index] = orthogonal(own[index]).contiguous()
        for index, matrix in enumerate(matrices):
            step_RC = own.pop(index, None)
            if step_RC is None:
                step_RC = torch.empty(matrix.shape, dtype=self.products, device=self.device)
            distributed.broadcast(step_RC, owners[index])
            self._move(matrix, checkpoint.shard(step_RC, matrix))


def orthogonal(matrix_RC: torch.Tensor) -> torch.Tensor:
    """About U V^T of a matrix U S V^T [R, C]: its singular values become .7 to 1.2.

    By Newton-Schulz's iteration with a quintic; all products are of the matrix's dtype.
    """
    is_tall = matrix_RC.shape[0] > matrix_RC.shape[1]
    x = matrix_RC.T if is_tall else matrix_RC
    x = x / x.norm().clamp(min=LEAST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def flops(rows: int, columns: int) -> float:
    """Of making one matrix orthogonal."""
    short, long = sorted((rows, columns))
    return float(STEPS * (4 * short**2 * long + 2 * short**3))


def _owners(matrices: Sequence[torch.Tensor], processes: int) -> list[int]:
    """By matrix: the process that makes it orthogonal. Large ones are dealt first."""
    order = sorted(range(len(matrices)), key=lambda index: -flops(*matrices[index].shape))
    owners = [0] * len(matrices)
    for place, index in enumerate(order):
        owners[index] = place % processes
    return owners
