"""Text sampled from a model in this process: a batch at once, each row with a seed of its own."""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from puzzle.model.modeling_puzzle import PuzzleForCausalLM


class GumbelNoise(LogitsProcessor):
    """Noise by which the largest logit is a sample of the softmax (the Gumbel-max trick).

    Every row draws from a generator of its own, so what is sampled does not depend on the batch,
    and torch's own generators stay as they are.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits over the temperature, [B, V], with the noise of one step."""
        uniform_BV = torch.stack(
            [
                torch.rand(scores.shape[1], generator=g, device=scores.device)
                for g in self.generators
            ]
        )
        return scores.float() / self.temperature - (-uniform_BV.log()).log()


@torch.no_grad()
def sample(
    model: PuzzleForCausalLM,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    temperature: float,
    seeds: Sequence[int],
) -> list[list[int]]:
    """At most `tokens` new token ids after each prompt, until the end of the text (included)."""
    device, longest = model.device, max(map(len, prompts))
    ids_BS = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    mask_BS = torch.zeros_like(ids_BS)
    for ids_S, mask_S, prompt in zip(ids_BS, mask_BS, prompts, strict=True):
        ids_S[longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask_S[longest - len(prompt) :] = 1
    ids_BS = model.generate(  # type: ignore[misc, assignment]
        ids_BS,
        attention_mask=mask_BS,
        max_new_tokens=tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([GumbelNoise(seeds, temperature, device)]),
        pad_token_id=0,
    )
    ends = model.generation_config.eos_token_id
    return [_until_end(row, ends) for row in ids_BS[:, longest:].tolist()]


def _until_end(ids: list[int], ends: int | Sequence[int] | None) -> list[int]:
    """A row without the padding after its end of text."""
    known = {ends} if isinstance(ends, int) else set(ends or ())
    return ids[: next((n + 1 for n, token in enumerate(ids) if token in known), len(ids))]
