"""The model card with figures: `model/card.py` and what evaluation has shown."""

from puzzle.evaluate.results import ModelResult, Results
from puzzle.model import card
from puzzle.stage import Job


def text(job: Job, results: Results) -> str:
    """Markdown with front matter."""
    run = job.run
    return card.text(run.recipe.parent, run.parent, results.blocks, _figures(results))


def _figures(results: Results) -> str:
    header = results.costs
    lines = ["## What it kept", "| | parent | this model |", "| --- | ---: | ---: |"]
    parent, child = _cells(results.parent), _cells(results.uptrained)
    lines += [f"| {label} | {parent[label]} | {child[label]} |" for label in parent]
    rates = [
        f"{side.throughput_tok_per_s:,.0f}"
        for side in (results.predicted_parent, results.predicted_child)
    ]
    speedup = f"{results.speedup:.2f}x"
    if results.speed is not None:
        sides = (results.speed.parent, results.speed.child)
        rates = [f"{side.throughput_tok_per_s.value:,.0f}" for side in sides]
        speedup = results.speed.speedup.with_unit(".2f", "x")
    lines.append(f"| output tokens/s | {rates[0]} | {rates[1]} |")
    lines.append(f"| speed-up | 1.00x | {speedup} |")
    engine, retention = header.engine, results.uptrained.retention
    kept = ""
    if retention is not None:
        kept = (
            f"Keeps {retention.value:.1%} ({retention.low:.1%} to {retention.high:.1%}) of the "
            f"parent's top-1 accuracy on {results.evaluated_tokens:,} tokens of test text. "
        )
    served = f"Speed {results.speed_word} with {engine.engine} {engine.version} on {engine.device}."
    return "\n".join([*lines, "", kept + served, "", ""])


def _cells(model: ModelResult) -> dict[str, str]:
    return {
        "parameters": f"{model.parameters:,}",
        "KV cache, bytes per token": f"{model.kv_cache_bytes_per_token:,}",
        "KL(parent || model), nats/token": f"{model.quality.kl.value:.4f}",
        "LM loss, nats/token": f"{model.quality.lm_loss.value:.4f}",
        "top-1 token accuracy": f"{model.quality.top1.value:.2%}",
    }
