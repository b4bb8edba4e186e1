"""Stage `score`: replace-1-block scores, the quality of the parent with one block replaced (paper: section 4.2).

The parent's activations at every block input are computed once. A replacement starts from there; the blocks of a
layer go through the layers after it together, batched to `tokens_per_pass`. Logits are chunked over tokens; the
parent's log-probabilities are recomputed from its final hidden state. Memory beside the parent: its activations
((L + 1) x tokens x D, on the host), one layer's variants, one pass.

Reads: the parent, the library, the validation side of the corpus. Writes: `score/scores.jsonl`, append-only, one
record per (layer, block, shard) with sums over tokens; `read` adds them up. The parent's own block
is among them: its KL is 0, its LM loss the parent's.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from puzzle import artifacts, library, subblocks
from puzzle.architecture import FFN, Attention, Block
from puzzle.losses import METRICS, token_metrics
from puzzle.modeling_puzzle import PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.run import Run


@dataclass(frozen=True)
class Score:
    """Means per token over all shards; `kl_stderr` is over sequences."""

    kl: float
    kl_stderr: float
    lm_loss: float
    top1: float
    top5: float


def inputs(run: Run) -> dict[str, Any]:
    return run.data_inputs | {
        "library": run.fingerprint_of("library"), "score": run.recipe.score.model_dump(mode="json"),
    }  # fmt: skip


def run(run: Run, folder: Path) -> dict[str, Any]:
    settings, parent = run.recipe.score, run.parent_model
    path = folder / "scores.jsonl"
    done = {(r["layer"], r["block"], r["shard"]) for r in artifacts.read_jsonl(path)}
    shards = run.corpus["validation"].head(settings.sequences).split(settings.shard_sequences)
    states = [parent_states(run, parent, tokens_BS) for tokens_BS in shards]
    names = [[block.name for block in options.blocks] for options in run.space.layers]
    with run.progress.task("scoring blocks", len(shards) * sum(map(len, names)), "blocks") as task:
        for layer, replaced in layers_with_variants(run, parent):
            for shard, tokens_BS in enumerate(shards):
                if all((layer, name, shard) in done for name in names[layer]):
                    task.skip(len(names[layer]))
                    continue
                sums = score_layer(run, parent, layer, replaced, states[shard], tokens_BS.to(run.device))
                for name, record in sums.items():
                    if (layer, name, shard) not in done:
                        artifacts.append_jsonl(path, {"layer": layer, "block": name, "shard": shard} | record)
                task.advance(len(sums))
    return {"scores": artifacts.file_fingerprint(path)}


class Variants:
    """The blocks of one layer as modules, ready to run: two subblocks composed, or a pair trained together."""

    def __init__(self, run: Run, layer: int, parent_layer: PuzzleDecoderLayer) -> None:
        own = parent_layer.state_dict()

        def load(block: Block, state: dict[str, torch.Tensor]) -> PuzzleDecoderLayer:
            module = subblocks.block_module(run.parent, block, run.attention)
            module.load_state_dict(state, strict=True)
            return module.to(run.device).requires_grad_(False).eval()

        blocks = run.space.layers[layer].blocks
        if run.recipe.library.coupled:
            whole = {b: load(b, library.read_block(run, layer, b, own)) for b in blocks}
            self.halves = {block: (module, module) for block, module in whole.items()}
            return
        no_attention, no_ffn = Attention("no_op"), FFN("no_op")
        attention = {a: load(Block(a, no_ffn), library.read_state(run, layer, a, own)) for a, _ in map(_pair, blocks)}
        ffn = {f: load(Block(no_attention, f), library.read_state(run, layer, f, own)) for _, f in map(_pair, blocks)}
        self.halves = {block: (attention[block.attention], ffn[block.ffn]) for block in blocks}

    def outputs(self, x_BSD: torch.Tensor, context: dict[str, Any]) -> Iterator[tuple[Block, torch.Tensor]]:
        """Every block's output [B, S, D]; an attention half shared by neighbours is computed once."""
        last: PuzzleDecoderLayer | None = None
        for block, (attention, ffn) in self.halves.items():
            if attention is not last:
                attended_BSD, last = attention.attention(x_BSD, **context), attention
            yield block, ffn.feed_forward(attended_BSD)


def _pair(block: Block) -> tuple[Attention, FFN]:
    return block.attention, block.ffn


def layers_with_variants(run: Run, parent: PuzzleForCausalLM) -> Iterator[tuple[int, Variants]]:
    for layer, module in enumerate(parent.model.layers):
        yield layer, Variants(run, layer, module)


@torch.no_grad()
def parent_states(run: Run, parent: PuzzleForCausalLM, tokens_BS: torch.Tensor) -> list[torch.Tensor]:
    """The parent's input of every layer and, last, its normed final hidden state: L + 1 host tensors [B, S, D]."""
    with run.autocast():
        hidden, context = parent.model.embed(tokens_BS.to(run.device))
        states = []
        for module in parent.model.layers:
            states.append(hidden.cpu())
            hidden = module(hidden, **context)
        return [*states, parent.model.norm(hidden).cpu()]


@torch.no_grad()
def score_layer(
    run: Run,
    parent: PuzzleForCausalLM,
    layer: int,
    variants: Variants,
    states: list[torch.Tensor],
    tokens_BS: torch.Tensor,
) -> dict[str, dict[str, float]]:
    """Sums over the tokens of `tokens_BS` of every metric, for every block of one layer."""
    x_BSD, final_BSD = states[layer].to(run.device), states[-1].to(run.device)
    per_pass = max(1, run.recipe.score.tokens_per_pass // tokens_BS.numel())
    results: dict[str, dict[str, float]] = {}
    with run.autocast():
        _, context = parent.model.embed(tokens_BS[:1])  # a batch of one fits any number of variants
        outputs = variants.outputs(x_BSD, context)
        while pending := list(itertools.islice(outputs, per_pass)):
            results |= _finish(parent, layer, pending, context, final_BSD, tokens_BS)
    return results


def _finish(
    parent: PuzzleForCausalLM,
    layer: int,
    pending: list[tuple[Block, torch.Tensor]],
    context: dict[str, Any],
    final_BSD: torch.Tensor,
    tokens_BS: torch.Tensor,
) -> dict[str, dict[str, float]]:
    """Run several replaced blocks through the layers after them at once and measure each."""
    count, (B, S) = len(pending), tokens_BS.shape
    hidden = torch.cat([output for _, output in pending])
    for module in parent.model.layers[layer + 1 :]:
        hidden = module(hidden, **context)
    child_CTD = parent.model.norm(hidden).view(count, B, S, -1)[:, :, :-1].flatten(1, 2)
    head = parent.lm_head.weight
    targets = tokens_BS[:, 1:].flatten()
    metrics_CMT = token_metrics(final_BSD[:, :-1].flatten(0, 1), head, child_CTD, head, targets)
    return {
        block.name: _sums(metrics_MT.view(len(METRICS), B, S - 1).double())
        for (block, _), metrics_MT in zip(pending, metrics_CMT, strict=True)
    }


def _sums(metrics_MBS: torch.Tensor) -> dict[str, float]:
    sums = dict(zip(METRICS, metrics_MBS.sum(dim=(1, 2)).tolist(), strict=True))
    kl_B = metrics_MBS[0].mean(dim=-1)
    return sums | {
        "tokens": metrics_MBS[0].numel(), "sequences": len(kl_B), "kl_mean_sum": kl_B.sum().item(),
        "kl_mean_square_sum": kl_B.square().sum().item(),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ reading


def read(run: Run) -> dict[tuple[int, str], Score]:
    """Scores by (layer, block name)."""
    totals: dict[tuple[int, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for record in artifacts.read_jsonl(run.stage_folder("score") / "scores.jsonl"):
        total = totals[record.pop("layer"), record.pop("block")]
        record.pop("shard")
        for key, value in record.items():
            total[key] += value
    return {key: _mean(total) for key, total in totals.items()}


def _mean(total: dict[str, float]) -> Score:
    tokens, sequences = total["tokens"], total["sequences"]
    mean = total["kl_mean_sum"] / sequences
    variance = max(0.0, total["kl_mean_square_sum"] / sequences - mean**2) / max(1, sequences - 1)
    return Score(
        kl=total["kl"] / tokens,
        kl_stderr=variance**0.5,
        lm_loss=total["lm_loss"] / tokens,
        top1=total["top1"] / tokens,
        top5=total["top5"] / tokens,
    )
