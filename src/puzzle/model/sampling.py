"""Text sampled from a model in this process, with a seed of its own."""

import torch

from puzzle.model.modeling_puzzle import PuzzleForCausalLM


@torch.no_grad()
def sample(
    model: PuzzleForCausalLM, prompt_S: torch.Tensor, tokens: int, temperature: float, seed: int
) -> list[int]:
    """At most `tokens` new token ids after a prompt, int64 [S], until the end of the text.

    The seed of torch's own generators stays as it was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ids_1S: torch.Tensor = model.generate(  # type: ignore[misc, assignment]
            prompt_S[None],
            attention_mask=torch.ones_like(prompt_S)[None],
            max_new_tokens=tokens,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            pad_token_id=0,
        )
    new: list[int] = ids_1S[0, len(prompt_S) :].tolist()
    return new
