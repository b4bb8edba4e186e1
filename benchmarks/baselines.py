"""What a user would do instead: the methods that the head-to-head compares with.

Not a benchmark itself. Each function says which paper it follows, and returns what that method
would make of the parent: an architecture, or a narrower model. All look at text for scores only.

Shape legend: B sequences, S positions, D hidden, I intermediate, L layers.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from puzzle.library.initialization import Calibration, calibrate, initial_state
from puzzle.model.architecture import FFN, NO_ATTENTION, NO_FFN, Architecture, Attention, Block
from puzzle.model.modeling_puzzle import PuzzleConfig
from puzzle.run import Run
from puzzle.score.assembled import AssembledKL
from puzzle.score.stage import text_shards

State = dict[str, torch.Tensor]
NOTHING = Block(NO_ATTENTION, NO_FFN)


@dataclass
class Activations:
    """What the depth and width methods look at: the parent's hidden states on text for scores."""

    states: list[torch.Tensor]  # the input of every layer and the last output, [B, S, D] each
    ffn: list[torch.Tensor]  # importance of each layer's FFN channels, [I] each
    hidden_D: torch.Tensor  # importance of the hidden channels


@torch.no_grad()
def activations(run: Run) -> Activations:
    """One pass over the parent.

    Minitron's importances (2407.14679, section 2.2): the mean over positions of the absolute
    activation, then the L2 norm over sequences: of what goes into the down projection, and of the
    outputs of all norms, summed over them.
    """
    model = run.parent_model.model
    ffn: list[torch.Tensor] = []
    hidden = torch.zeros(run.parent.shape.hidden_size)

    def importance(x_BSN: torch.Tensor) -> torch.Tensor:
        return x_BSN.float().abs().mean(dim=1).norm(dim=0).cpu()

    def see_down(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        ffn.append(importance(args[0]))

    def see_norm(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        hidden.add_(importance(output))

    hooks = []
    for layer in model.layers:
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(see_down))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            hooks.append(norm.register_forward_hook(see_norm))
    tokens_BS = torch.cat([shard.tokens_BS for shard in text_shards(run)])
    x_BSD, context = model.embed(tokens_BS.to(run.device.torch_device))
    states = [x_BSD]
    for layer in model.layers:
        x_BSD = layer(x_BSD, **context)
        states.append(x_BSD)
    for hook in hooks:
        hook.remove()
    return Activations(states, ffn, hidden)


def _distance(before: torch.Tensor, after: torch.Tensor) -> float:
    return float(1 - torch.cosine_similarity(before, after, dim=-1).mean())


def without(parent: Architecture, layers: Sequence[int], half: str = "both") -> Architecture:
    """The parent's architecture with some layers, or halves of them, removed."""
    blocks = list(parent.blocks)
    for layer in layers:
        attention, ffn = blocks[layer].subblocks
        attention = NO_ATTENTION if half in ("both", "attention") else attention
        blocks[layer] = Block(attention, NO_FFN if half in ("both", "ffn") else ffn)
    return Architecture(tuple(blocks))


# ------------------------------------------------------------------------------------------- depth


def block_influence(seen: Activations, parent: Architecture, count: int) -> Architecture:
    """ShortGPT (2403.03853): the layers whose output is most like their input go.

    Block influence is 1 - mean cosine of a layer's input and output, on the intact parent.
    """
    influence = [_distance(*pair) for pair in itertools.pairwise(seen.states)]
    least = sorted(range(len(influence)), key=influence.__getitem__)[:count]
    return without(parent, least)


def contiguous(seen: Activations, parent: Architecture, count: int) -> Architecture:
    """Gromov et al. (2403.17887): the run of layers over which the hidden state turns the least."""
    starts = range(len(parent) - count + 1)
    turned = [_angle(seen.states[first], seen.states[first + count]) for first in starts]
    first = min(starts, key=turned.__getitem__)
    return without(parent, range(first, first + count))


def _angle(before: torch.Tensor, after: torch.Tensor) -> float:
    """The mean angle at the last position of every sequence, as the paper has it."""
    cosine = torch.cosine_similarity(before[:, -1], after[:, -1], dim=-1)
    return float(cosine.clamp(-1, 1).arccos().mean())


def greedy_removal(
    measurement: AssembledKL, parent: Architecture, half: str = "both"
) -> list[Architecture]:
    """Remove what costs the least KL, measure again, and so on: by number of layers removed.

    With `half: attention` only attentions go (as in "What matters in Transformers?", 2406.15786,
    which goes by similarity; by KL it is stronger). Stock vLLM needs the attention of layer 0.
    """
    first = 1 if half == "attention" else 0
    removed: list[int] = []
    found = [parent]
    for _ in range(len(parent) - 1 - first):
        left = [layer for layer in range(first, len(parent)) if layer not in removed]
        kls = {layer: measurement.kl(without(parent, [*removed, layer], half)) for layer in left}
        removed.append(min(left, key=kls.__getitem__))
        found.append(without(parent, removed, half))
    return found


@dataclass(frozen=True)
class Evolution:
    """The budget of EvoPress: its own ratios, scaled to a parent of a few layers."""

    initial: int = 32
    offspring: int = 16
    generations: int = 40
    survivors: tuple[int, ...] = (4, 1)  # of the selection on few sequences, then on all


def evopress(
    run: Run, parent: Architecture, count: int, budget: Evolution | None = None
) -> Architecture:
    """EvoPress (2410.14649), depth pruning: `count` attentions and `count` FFNs are dropped.

    A (1 + lambda) evolution on the KL: offspring switch a dropped subblock with a kept one of the
    same kind (1 to 3 times), are ranked on few tokens, and the best of them on all, together with
    their parent.
    """
    budget = budget or Evolution()
    rng, layers = random.Random(0), range(len(parent))
    shards = text_shards(run)
    stages = (AssembledKL(run, shards[:1]), AssembledKL(run, shards))
    Dropped = tuple[frozenset[int], frozenset[int]]

    def architecture(dropped: Dropped) -> Architecture:
        attention_gone = without(parent, sorted(dropped[0]), "attention")
        return without(attention_gone, sorted(dropped[1]), "ffn")

    def switched(dropped: Dropped) -> Dropped:
        halves = [set(half) for half in dropped]
        for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
            half = halves[rng.randrange(2)]
            if 0 < len(half) < len(parent):
                half.remove(rng.choice(sorted(half)))
                half.add(rng.choice([layer for layer in layers if layer not in half]))
        return frozenset(halves[0]), frozenset(halves[1])

    def best(candidates: list[Dropped], elite: list[Dropped]) -> Dropped:
        for measurement, keep in zip(stages, budget.survivors, strict=True):
            pool = list(dict.fromkeys([*candidates, *elite]))
            kls = {one: measurement.kl(architecture(one)) for one in pool}
            candidates = sorted(pool, key=kls.__getitem__)[:keep]
        return candidates[0]

    def drawn() -> Dropped:
        halves = (frozenset(rng.sample(layers, count)) for _ in range(2))
        return next(halves), next(halves)

    current = best([drawn() for _ in range(budget.initial)], [])
    for _ in range(budget.generations):
        current = best([switched(current) for _ in range(budget.offspring)], [current])
    return architecture(current)


# ------------------------------------------------------------------------------------------- width


@dataclass(frozen=True)
class Narrow:
    """A Minitron model: whole layers removed, the rest of one FFN and one hidden width."""

    removed: tuple[int, ...]
    ffn: int
    hidden: int

    @property
    def label(self) -> str:
        """What it is, in words."""
        depth = f", {len(self.removed)} layers removed" if self.removed else ""
        return f"hidden {self.hidden}, FFN {self.ffn}{depth}"


def minitron(run: Run, seen: Activations, depth: bool) -> list[Narrow]:
    """Minitron (2407.14679): one width everywhere, from wide to narrow; with `depth`, fewer layers.

    Hidden size and FFN shrink together, attention heads stay (as in the paper's best candidates);
    layers go by block influence. The FFN keeps three times the hidden size, the parent's ratio.
    """
    shape = run.parent.shape
    ratio = shape.intermediate_size / shape.hidden_size
    step = 32
    influence = [_distance(*pair) for pair in itertools.pairwise(seen.states)]
    order = sorted(range(len(influence)), key=influence.__getitem__)
    found = []
    for index, hidden in enumerate(range(shape.hidden_size - step, step, -step), start=1):
        removed = tuple(sorted(order[: 2 * index])) if depth else ()
        if len(removed) < shape.num_hidden_layers - 1:
            found.append(Narrow(removed, int(ratio * hidden), hidden))
    return found


def narrow_architecture(parent: Architecture, narrow: Narrow) -> Architecture:
    """The blocks of a Minitron model."""
    blocks = [
        NOTHING if layer in narrow.removed else Block(block.attention, FFN("gated", narrow.ffn))
        for layer, block in enumerate(parent)
    ]
    return Architecture(tuple(blocks))


def narrow_model(
    run: Run, seen: Activations, narrow: Narrow
) -> tuple[PuzzleConfig, Architecture, State]:
    """Config, blocks and weights: the most important channels of the parent, cut out."""
    architecture = narrow_architecture(Architecture.of_parent(run.parent.shape), narrow)
    config = run.parent.child_config(architecture)
    config.hidden_size = narrow.hidden
    config.head_dim = run.parent.shape.head_dim
    kept = seen.hidden_D.topk(narrow.hidden).indices.sort().values
    parent = run.parent.weights()
    state: State = {}
    for name in parent:
        tensor = parent[name]
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            if layer in narrow.removed:
                continue
            channels = seen.ffn[layer].topk(narrow.ffn).indices.sort().values
            if "mlp.gate_proj" in name or "mlp.up_proj" in name:
                tensor = tensor[channels]
            elif "mlp.down_proj" in name:
                tensor = tensor[:, channels]
        if name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")):
            tensor = tensor[kept]
        else:  # what reads the hidden state, and the embedding
            tensor = tensor[:, kept]
        state[name] = tensor.contiguous()
    return config, architecture, state


# -------------------------------------------------------------------------------- without a library


@torch.no_grad()
def cut_from_parent(run: Run, architecture: Architecture) -> State:
    """The child's weights as BLD starts them, untrained (paper: appendix A, and ours)."""
    settings, model = run.recipe.library, run.parent_model.model
    parent = run.parent.weights()
    state = {name: parent[name] for name in parent if not name.startswith("model.layers.")}
    tokens_BS = run.corpus["train"].batch(0, settings.calibration_sequences)
    x_BSD, context = model.embed(tokens_BS.to(run.device.torch_device))
    for index, (module, block) in enumerate(zip(model.layers, architecture, strict=True)):
        is_least_squares = settings.initialization == "least_squares"
        calibration = calibrate(module, [x_BSD], context, is_least_squares)
        for half in block.subblocks:
            made = _cut(run, index, half, module.state_dict(), calibration)
            state |= {f"model.layers.{index}.{name}": tensor for name, tensor in made.items()}
        x_BSD = module(x_BSD, **context)
    return state


def _cut(
    run: Run,
    layer: int,
    half: Attention | FFN,
    layer_state: State,
    calibration: Calibration,
) -> State:
    from puzzle.model.variants import subblock_state

    if half in run.parent.shape.parent_blocks[layer].subblocks:
        return dict(subblock_state(layer_state, type(half)))
    return initial_state(layer_state, half, run.parent.shape, calibration)


def random_weights(state: State, deviation: float = 0.02) -> State:
    """The same shapes from a random start: matrices normal, norms one."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones_like(tensor)
        if tensor.ndim == 1
        else torch.randn(tensor.shape, generator=generator) * deviation
        for name, tensor in state.items()
    }


# ---------------------------------------------------------------------------------------- knobs


def around(
    speed: Callable[[int], float], knobs: Sequence[int], wish: float
) -> tuple[int | None, int | None]:
    """(the last knob below a wish, the first that reaches it); speeds rise with the knob."""
    below = [knob for knob in knobs if speed(knob) < wish]
    above = [knob for knob in knobs if speed(knob) >= wish]
    return (max(below) if below else None, min(above) if above else None)
