"""Fisher estimate of replace-1-block scores: a squared inner product instead of a run to the end.

With y_t drawn from the parent's own prediction at every position, and g the gradient of sum_t log
p(y_t) with respect to the output of a block, the expected squared inner product <g, delta>^2 of a
sequence is the Fisher information in the direction delta, the change of the block's output; half of
it is KL(parent || changed), summed over positions, to second order. Cross terms between positions
vanish in expectation, because the score of a later token has mean zero given the earlier ones.

The gradients of a shard travel backward layer by layer: one layer's graph is alive at a time, and
the parent's layer is computed once for all samples. Memory: `fisher_samples` tensors [B, S, D]
beside the parent's activations.

Shape legend: K samples, B sequences, S positions, D hidden, T = B * (S - 1) predicted tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from puzzle.model.layers import ParentLayers
from puzzle.model.modeling_puzzle import LayerContext
from puzzle.run import Run
from puzzle.score.exact import LoadBlocks
from puzzle.score.results import Sums
from puzzle.training.losses import tokens_per_chunk


class Estimator:
    """Estimates layer by layer, from the last to the first, on one shard."""

    def __init__(
        self,
        run: Run,
        parent: ParentLayers,
        tokens_BS: torch.Tensor,
        states: Sequence[torch.Tensor],
        context: LayerContext,
    ) -> None:
        self.run, self.parent, self.states, self.context = run, parent, states, context
        self.device = run.device.torch_device
        self.layer = len(states) - 2
        seed = int(tokens_BS.sum())  # the same draws whenever this shard is estimated
        generator = torch.Generator(self.device).manual_seed(seed)
        self.gradient_KBSD = self._last_gradient(generator)

    def _last_gradient(self, generator: torch.Generator) -> torch.Tensor:
        """d sum_t log p(y_t) / d output of the last layer, [K, B, S, D]."""
        hidden = self.states[-1].to(self.device, non_blocking=True).float().requires_grad_()
        with torch.enable_grad():
            normed = self.parent.norm(hidden)
        count = self.run.recipe.score.fisher_samples
        gradients = self._head_gradients(normed.detach(), count, generator)
        for sample in range(count):
            (gradients[sample],) = torch.autograd.grad(
                normed, hidden, gradients[sample], retain_graph=True
            )
        return gradients

    @torch.no_grad()
    def _head_gradients(
        self, normed_BSD: torch.Tensor, count: int, generator: torch.Generator
    ) -> torch.Tensor:
        """d log p(y) / d normed hidden state, [K, B, S, D], in closed form: W[y] - p W.

        The last position predicts nothing: its gradient is 0.
        """
        cap, head = self.parent.soft_cap, self.parent.head_VD.float()
        B, S, D = normed_BSD.shape
        gradients = torch.zeros(count, B, S, D, device=normed_BSD.device)
        # where the predicted tokens are among all B * S positions
        places_T = torch.arange(B * S, device=normed_BSD.device).view(B, S)[:, :-1].flatten()
        for rows_T in places_T.split(tokens_per_chunk(head)):
            logits_TV = normed_BSD.flatten(0, 1)[rows_T].float() @ head.T
            slope_TV = None
            if cap is not None:  # logits are cap * tanh(z / cap), of slope 1 - tanh^2
                logits_TV = logits_TV.div_(cap).tanh_()
                slope_TV, logits_TV = 1 - logits_TV.square(), logits_TV * cap
            p_TV = F.softmax(logits_TV, dim=-1)
            expected_TD = (p_TV if slope_TV is None else p_TV * slope_TV) @ head
            for sample in range(count):
                y_T1 = torch.multinomial(p_TV, 1, generator=generator)
                drawn_TD = head[y_T1[:, 0]]
                if slope_TV is not None:
                    drawn_TD = drawn_TD * slope_TV.gather(1, y_T1)
                gradients[sample].flatten(0, 1)[rows_T] = drawn_TD - expected_TD
        return gradients

    def estimate(self, layer: int, blocks: LoadBlocks) -> dict[str, Sums]:
        """As exact scores, of `kl` only. Layers must come in falling order."""
        while self.layer > layer:
            self._step_back()
        with torch.no_grad(), self.run.device.autocast(), self.parent.layer(layer) as module:
            x_BSD = self.states[layer].to(self.device, non_blocking=True)
            o_BSD = self.states[layer + 1].to(self.device, non_blocking=True)
            kl_sums = {
                block.name: self._half_squares(output.float() - o_BSD.float())
                for block, output in blocks(module).outputs(x_BSD, self.context)
            }
        positions = x_BSD.shape[1] - 1
        return {name: _sums(kl_B / positions, positions) for name, kl_B in kl_sums.items()}

    def _half_squares(self, delta_BSD: torch.Tensor) -> torch.Tensor:
        """Half the mean over samples of <g, delta>^2 of every sequence, [B]."""
        gradient_BKN = self.gradient_KBSD.flatten(2).transpose(0, 1)
        with torch.autocast(delta_BSD.device.type, enabled=False):
            inner_BK1 = torch.matmul(gradient_BKN, delta_BSD.flatten(1)[:, :, None])
        return 0.5 * inner_BK1[:, :, 0].square().mean(dim=1)

    def _step_back(self) -> None:
        """From the gradient at a layer's output to the one at its input."""
        x_BSD = self.states[self.layer].to(self.device, non_blocking=True).requires_grad_()
        with self.parent.layer(self.layer) as module:
            with torch.enable_grad(), self.run.device.autocast():
                output = module(x_BSD, **self.context)
            for sample in range(len(self.gradient_KBSD)):
                gradient = self.gradient_KBSD[sample].to(output.dtype)
                (self.gradient_KBSD[sample],) = torch.autograd.grad(
                    output, x_BSD, gradient, retain_graph=True
                )
            del output
        self.layer -= 1


def _sums(kl_B: torch.Tensor, positions: int) -> Sums:
    kl_B = kl_B.double()
    total, squares = torch.stack([kl_B.sum(), kl_B.square().sum()]).tolist()
    return Sums(
        sums={"kl": total * positions},
        squares={"kl": squares},
        tokens=kl_B.numel() * positions,
        sequences=kl_B.numel(),
    )
