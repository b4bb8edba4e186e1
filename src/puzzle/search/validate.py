"""Do the scores mean anything? Sums of scores against the KL of really assembled children.

    puzzle score RUN --validate N

Half of the architectures are random, with a random share of layers changed; the other half are what
a search takes for falling limits on the parameters. Each is put together from the library in memory
and run over the sequences that the scores were made on. Writes: `score/validation.json`, which the
report draws.
"""

import itertools
import random
from typing import Any

import numpy as np
import torch

from puzzle import artifacts
from puzzle.errors import UserError
from puzzle.library import stage as library
from puzzle.model import variants as subblocks
from puzzle.model.architecture import Architecture, Block
from puzzle.model.modeling_puzzle import PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.run import Run
from puzzle.score import stage as score
from puzzle.search import mip
from puzzle.training.losses import METRICS

BINS = (0.0, 0.2, 0.4, 0.6, 1.01)  # shares of the layers' parameters that are removed


def run(run: Run, count: int) -> dict[str, Any]:
    """Correlations over all architectures and by how much of the model is removed."""
    run.fingerprint_of("score")
    if count < 4:
        raise UserError(f"score --validate: got {count}, expected at least 4 architectures")
    losses, shape = score.losses(run), run.parent.shape
    whole = sum(
        shape.parameters(v) for b in Architecture.of_parent(shape) for v in (b.attention, b.ffn)
    )
    chosen = random_architectures(run, losses, count - count // 2) + searched_architectures(
        run, losses, count // 2
    )
    shards = [shard for shard in score.all_shards(run) if shard.questions is None]
    states = [score.parent_states(run, run.parent_model, shard.tokens_BS)[-1] for shard in shards]
    points: list[dict[str, Any]] = []
    with run.progress.task("assembling and measuring", len(chosen), "children") as task:
        for origin, architecture in chosen:
            parameters = sum(
                shape.parameters(v) for b in architecture for v in (b.attention, b.ffn)
            )
            points.append(
                {
                    "origin": origin,
                    "blocks": architecture.names,
                    "removed": 1 - parameters / whole,
                    "sum": sum(losses[i, b.name] for i, b in enumerate(architecture)),
                    "kl": assembled_kl(run, architecture, shards, states),
                }
            )
            task.advance()
    found: dict[str, dict[str, Any]] = {"all": correlations(points)}
    for low, high in itertools.pairwise(BINS):
        inside = [p for p in points if low <= p["removed"] < high]
        found[f"{low:.0%} to {min(high, 1):.0%} removed"] = correlations(inside)
    written = {"metric": run.recipe.score.metric, "correlations": found, "points": points}
    artifacts.write_json(run.stage_folder("score") / "validation.json", written)
    for name, figures in found.items():
        if figures["spearman"] is not None:
            run.progress.say(
                f"  {name}: {figures['count']} children, Spearman {figures['spearman']:.3f}, "
                f"Pearson {figures['pearson']:.3f}"
            )
    return found["all"]


Losses = dict[tuple[int, str], float]


def random_architectures(run: Run, losses: Losses, count: int) -> list[tuple[str, Architecture]]:
    rng, parent, found = random.Random(0), run.parent.shape.parent_block, []
    layers = score.scored_layers(run, losses)
    for _ in range(count):
        share = rng.random()
        blocks = [rng.choice(options) if rng.random() < share else parent for options in layers]
        found.append(("random", Architecture(tuple(blocks))))
    return found


def searched_architectures(run: Run, losses: Losses, count: int) -> list[tuple[str, Architecture]]:
    """The best sums of scores at equal steps of parameters, from little removed to most."""
    shape, layers = run.parent.shape, score.scored_layers(run, losses)
    flat = [block for options in layers for block in options]
    sizes = np.array([float(shape.parameters(b.attention) + shape.parameters(b.ffn)) for b in flat])
    costs = np.array([losses[i, b.name] for i, options in enumerate(layers) for b in options])
    starts = mip.starts_of([len(options) for options in layers])
    whole = sum(sizes[start] for start in starts[:-1])  # the parent's block comes first
    found = []
    for share in np.linspace(0.95, 0.3, count):
        program = mip.Program(starts, costs, sizes[None], np.array([share * whole]))
        solved = mip.solve(program, gap=1e-3)
        if solved is not None:
            found.append(
                ("searched", Architecture(tuple(flat[column] for column in solved.chosen)))
            )
    return found


@torch.no_grad()
def assembled_kl(
    run: Run, architecture: Architecture, shards: list[score.Shard], states: list[torch.Tensor]
) -> float:
    """KL(parent || child) in nats per token over the shards; one block of the child is in memory at
    a time.
    """
    parent = run.parent_model
    with run.autocast():
        embedded = [parent.model.embed(shard.tokens_BS.to(run.device)) for shard in shards]
        hidden = [x_BSD for x_BSD, _ in embedded]
        for index, block in enumerate(architecture):
            module = _block(run, parent, index, block)
            hidden = [
                module(x_BSD, **context)
                for x_BSD, (_, context) in zip(hidden, embedded, strict=True)
            ]
        total, tokens = 0.0, 0
        last = len(architecture) - 1
        for x_BSD, (_, context), final_BSD, shard in zip(
            hidden, embedded, states, shards, strict=True
        ):
            normed_BSD, tokens_BS = (
                parent.model.norm(final_BSD.to(run.device)),
                shard.tokens_BS.to(run.device),
            )
            kl_BS = score.finish(parent, last, [x_BSD], context, normed_BSD, tokens_BS)[
                0, METRICS.index("kl")
            ]
            total, tokens = total + kl_BS.sum().item(), tokens + kl_BS.numel()
    return total / tokens


def _block(run: Run, parent: PuzzleForCausalLM, layer: int, block: Block) -> PuzzleDecoderLayer:
    own: PuzzleDecoderLayer = parent.model.layers[layer]
    if block == run.parent.shape.parent_block:
        return own
    state = library.read_block(run, layer, block, own.state_dict())
    return subblocks.frozen_module(run.parent, layer, block, run.attention, state).to(run.device)


def correlations(points: list[dict[str, Any]]) -> dict[str, float | int | None]:
    """Spearman and Pearson of the sums of scores and the measured KL; None below four points."""
    pairs = np.array([[p["sum"], p["kl"]] for p in points]).reshape(-1, 2)
    if len(pairs) < 4 or (pairs.std(axis=0) == 0).any():
        return {"count": len(pairs), "spearman": None, "pearson": None}
    ranks = pairs.argsort(axis=0).argsort(axis=0)
    return {
        "count": len(pairs),
        "spearman": float(np.corrcoef(ranks.T)[0, 1]),
        "pearson": float(np.corrcoef(pairs.T)[0, 1]),
    }
