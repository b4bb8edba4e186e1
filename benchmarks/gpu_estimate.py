"""Hours on a GPU for Llama-3.1-8B, from counted work and fixed rates. Nothing is computed.

    python benchmarks/gpu_estimate.py [--json] [--quick]

The library's, the scores' and the uptraining's own code runs at the real widths on fake CUDA
tensors (tests/fake_cuda; g++ builds its guard once). Every operator is counted: FLOPs of products
by dtype, bytes touched by the others, launches. A part takes the larger of its operators' time on
the device (each the larger of its FLOPs and its bytes at the rates below) and its launches, which
hide behind the device's work. One layer, one pass, one micro-batch are counted; the rest is
multiplication. Beside each goal stands what the same work took before: variants of a layer one by
one, the parent's logits once a block.

The rates are what an H100 reaches, not its data sheet. Real runs also wait for disks and networks,
which is not counted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fake_cuda import shim

shim.load()

import collections
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import common
import torch
import torch.nn.functional as F
from fake_cuda.mode import VIEWS, fake_cuda
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from puzzle import config, settings
from puzzle.commands import planning
from puzzle.library import memory as library_memory
from puzzle.library.bld import ParentBatch, VariantTrainer
from puzzle.library.records import LossPoint
from puzzle.model import child, modeling_puzzle, variants
from puzzle.model.architecture import FFN, Architecture, Block
from puzzle.model.layers import ParentLayers
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score import memory as score_memory
from puzzle.score.exact import Suffix
from puzzle.score.modules import LayerBlocks
from puzzle.uptrain import memory as uptrain_memory
from puzzle.uptrain.gkd import Pair

PLANS = Path(__file__).parents[1] / "examples" / "cluster"
CUDA = torch.device("cuda")
FLOPS_PER_S = {torch.bfloat16: 650e12, torch.float32: 350e12}
BYTES_PER_S, LINK_BYTES_PER_S, LAUNCH_S = 2.7e12, 50e9, 5e-6
HOST_BYTES_PER_S = 100e9  # of AdamW on the host
GOALS = {"library": 120.0, "score": 35 / 60, "uptrain": 35.0}  # hours


@dataclass
class Work:
    """What some code asks of a device."""

    device_s: float = 0.0
    launches: int = 0
    flops: dict[torch.dtype, float] = field(default_factory=lambda: collections.defaultdict(float))
    other_bytes: float = 0.0

    @property
    def seconds(self) -> float:
        """Launches hide behind the device's work, or the other way round."""
        return max(self.device_s, self.launches * LAUNCH_S)


class Counter(TorchDispatchMode):
    """Counts every operator that touches the device."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        inputs = [
            t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_cuda
        ]
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_cuda]
        if name in VIEWS or func.namespace != "aten" or not (inputs or outputs):
            return out
        touched = {id(t): t.numel() * t.element_size() for t in (*inputs, *outputs)}
        size = float(sum(touched.values()))
        if name.startswith(("embedding", "index", "gather", "scatter")):
            size = 2.0 * sum(t.numel() * t.element_size() for t in outputs)
        flops, work = _flops(name, args), self.work
        dtype = torch.float32
        if flops:
            dtype = inputs[1].dtype  # a factor, not a bias or random state
            work.flops[dtype] += flops
        else:
            work.other_bytes += size
        work.launches += 1
        work.device_s += max(flops / FLOPS_PER_S[dtype], size / BYTES_PER_S)
        return out


def _on_device(values: object) -> list[torch.Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, torch.Tensor) and t.is_cuda]


def _flops(name: str, args: tuple[Any, ...]) -> float:
    if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm"):
        left, right = args[1:3] if "addmm" in name or "baddbmm" in name else args[:2]
        return 2.0 * left.numel() * right.shape[-1]
    if "scaled_dot_product" in name and "attention" in name:
        backward = "backward" in name
        query, key = args[1:3] if backward else args[:2]
        B, H, S, d = query.shape
        return (10.0 if backward else 4.0) * B * H * S * key.shape[2] * d / 2  # the causal half
    return 0.0


class FusedNorm(torch.autograd.Function):
    """Stands for a GPU's kernels of RMSNorm: one pass forward, one over both inputs backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return torch.addcmul(grad, x, weight), torch.empty_like(weight)


def fused_norm(
    x: torch.Tensor, shape: tuple[int, ...], weight: torch.Tensor | None = None, eps: float = 0.0
) -> torch.Tensor:
    """`F.rms_norm`, which a torch without CUDA takes apart."""
    weight = torch.empty(shape, dtype=x.dtype, device=x.device) if weight is None else weight
    out: torch.Tensor = FusedNorm.apply(x, weight)
    return out


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Fake CUDA, with the kernel of norms and the plain causal mask that a GPU gets."""
    with (
        mock.patch.object(F, "rms_norm", fused_norm),
        mock.patch.object(modeling_puzzle, "create_causal_mask", lambda **_: None),
        fake_cuda(),
    ):
        yield


def counted(do: Callable[[], object]) -> Work:
    """The work of a function, the second time: the first makes what it keeps."""
    do()
    with Counter() as counter:
        do()
    return counter.work


# ------------------------------------------------------------------------------------------ parts


def open_run(name: str, root: Path) -> Run:
    """The recipe of the paper's space, planned for such a GPU."""
    values = settings.read_yaml(PLANS / "llama-3.1-8b.yaml", "recipe")
    values["parent"] = str(PLANS / "llama-3.1-8b")
    return Run(config.parse(values), root, Progress(quiet=True), device=planning.device(name))


def model(run: Run, blocks: list[Block], dtype: torch.dtype) -> PuzzleForCausalLM:
    """A model of these blocks without contents."""
    architecture = Architecture(tuple(blocks))
    made = child.skeleton(run.parent.child_config(architecture), CUDA, "sdpa")
    made.to(dtype)
    state = {n: torch.empty_like(t, device=CUDA) for n, t in made.state_dict().items()}
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False)


def library(run: Run) -> dict[str, Any]:
    """Every variant of one layer on one batch, together and one by one."""
    recipe, parent = run.recipe, model(run, [run.parent.shape.widest_block], torch.bfloat16)
    rows, length = recipe.library.batch_sequences, recipe.corpus.sequence_length
    layer = parent.model.layers[0]
    x_BSD, context = parent.model.embed(torch.zeros(rows, length, dtype=torch.long, device=CUDA))
    trainers, parameters = [], 0
    for index, variant in library_memory.trained_variants(run):
        if index == 0:
            trainer = VariantTrainer(0, variant, steps=1 << 20)
            with torch.device("meta"):
                module = variants.block_module(run.parent, 0, trainer.block, "sdpa")
            trainer.begin(module.to_empty(device=CUDA))
            trainer.history = [LossPoint(tokens=0, validation=0.1)]
            trainers.append(trainer)
            parameters += run.parent.shape.parameters(variant)

    def together() -> None:
        with run.device.autocast():
            batch = ParentBatch.from_layer(layer, x_BSD, context)
            for trainer in trainers:
                trainer.train_step(batch, recipe.library)

    def one_by_one() -> None:
        with run.device.autocast():
            for trainer in trainers:
                batch = ParentBatch.from_layer(layer, x_BSD, context)
                trainer.train_step(batch, recipe.library)

    layers = run.parent.shape.num_hidden_layers
    batches = recipe.library.tokens / (rows * length)
    steps = library_memory.chunk_steps(run, streamed=True)
    hours: dict[str, float] = {}
    for name, work, chunk in (
        ("before", counted(one_by_one), library_memory.CHUNK_STEPS),
        ("now", counted(together), steps),
    ):
        # to the device for every variant, or hidden behind the batch before; back once
        crossings = 1 + (len(trainers) if name == "before" else 0)
        link = 1.0 * crossings * x_BSD.nbytes + 2.0 * 12 * parameters / chunk
        hours[name] = (work.seconds + link / LINK_BYTES_PER_S) * layers * batches / 3600
        hours[f"{name}_link"] = link / LINK_BYTES_PER_S * layers * batches / 3600
    print(
        f"library: {len(trainers)} variants a layer, {parameters / 1e6:.0f}M parameters, chunks of "
        f"{steps}; the link to the host {hours['now_link']:.1f} h, before "
        f"{hours['before_link']:.1f} h"
    )
    return report("library", work, hours)


def score(run: Run) -> dict[str, Any]:
    """Every block of the space on all the text."""
    recipe, shape = run.recipe, run.parent.shape
    parent = model(run, [shape.widest_block] * 2, torch.bfloat16)
    rows, length = recipe.score.shard_sequences, recipe.corpus.sequence_length
    tokens = torch.zeros(rows, length, dtype=torch.long, device=CUDA)
    x_BSD, _ = parent.model.embed(tokens)
    _, context = parent.model.embed(tokens[:1])
    blocks = list(run.space.layers[0].blocks)
    modules = {}
    for half in dict.fromkeys(half for block in blocks for half in block.subblocks):
        with torch.device("meta"):
            module = variants.block_module(run.parent, 0, half.alone, "sdpa")
        modules[half] = module.to(torch.bfloat16).to_empty(device=CUDA).requires_grad_(False)
    halves = {block: (modules[block.attention], modules[block.ffn]) for block in blocks}
    of_parent = ParentLayers(parent)
    outputs, suffix = LayerBlocks(halves), Suffix(of_parent, of_parent, context, x_BSD, tokens)
    final_TD = x_BSD[:, :-1].flatten(0, 1)
    most = score_memory.passing_blocks(run, tokens.numel(), streamed=False)
    held = min(len(blocks), most)
    with torch.no_grad():
        of_blocks = counted(lambda: list(outputs.outputs(x_BSD, context)))
        of_layer = counted(lambda: parent.model.layers[1](x_BSD, **context))
        of_head = {n: counted(lambda n=n: suffix.metrics([final_TD] * n)) for n in (1, held)}
    layers, shards = shape.num_hidden_layers, recipe.score.sequences / rows
    per_layer = len(blocks) * sum(layers - 1 - i for i in range(layers)) / layers
    hours = {
        name: shards * layers * (of_blocks.seconds + per_layer * of_layer.seconds + head) / 3600
        for name, head in (
            ("before", len(blocks) * of_head[1].seconds),
            ("now", len(blocks) / held * of_head[held].seconds),
        )
    }
    print(
        f"score: {len(blocks) * layers} blocks, {held} wait for the head together; of "
        f"{hours['now'] * 60:.1f} min the head takes "
        f"{shards * layers * len(blocks) / held * of_head[held].seconds / 60:.1f}"
    )
    return report("score", of_layer, hours)


def uptrain(run: Run) -> dict[str, Any]:
    """A child whose FFNs are half as wide; a micro-batch of models of 1 and of 3 layers."""
    job = run.child_job("main")
    shape, length = run.parent.shape, run.recipe.corpus.sequence_length
    small = Block(shape.widest_block.attention, FFN("gated", shape.intermediate_size // 2))
    parameters = Architecture((small,) * shape.num_hidden_layers).parameters(shape)
    case = uptrain_memory.Case(job, parameters, 1)
    choice = case.fitting()
    assert choice is not None
    dtype = torch.float32 if choice.optimizer == "device" else torch.bfloat16
    rows, batch = choice.micro_batch_sequences, job.child.uptrain.batch_sequences
    tokens = torch.zeros(rows, length, dtype=torch.long, device=CUDA)
    seconds = {}
    for layers in (1, 3):
        learning = model(run, [small] * layers, dtype).requires_grad_(True).train()
        frozen = model(run, [shape.widest_block] * layers, torch.bfloat16)
        pair = Pair(learning, frozen, job.child.uptrain, choice.activation_checkpointing)
        adam = torch.optim.AdamW(learning.parameters(), fused=True)

        def micro(pair: Pair = pair) -> None:
            with run.device.autocast():
                loss, _ = pair(tokens)
            loss.backward()

        seconds[layers] = (counted(micro), counted(adam.step))
    of_micro, of_step = (
        one.seconds + (three.seconds - one.seconds) / 2 * (shape.num_hidden_layers - 1)
        for one, three in zip(seconds[1], seconds[3], strict=True)
    )
    if choice.optimizer == "host":
        host_bytes = 28.0 * parameters
        of_step = 6.0 * parameters / LINK_BYTES_PER_S + host_bytes / HOST_BYTES_PER_S
    steps = job.child.uptrain.tokens / (batch * length)
    hours = {"now": steps * (batch / rows * of_micro + of_step) / 3600}
    print(
        f"uptrain: a child of {parameters / 1e9:.2f}B parameters; {choice}; a step is "
        f"{batch / rows:.0f} micro-batches of {of_micro:.2f} s and {of_step:.2f} s of AdamW"
    )
    return report("uptrain", seconds[3][0], hours)


def report(name: str, work: Work, hours: dict[str, float]) -> dict[str, Any]:
    """One row, and the figures as JSON."""
    flops = {str(dtype).removeprefix("torch."): value for dtype, value in work.flops.items()}
    verdict = "within" if hours["now"] <= GOALS[name] else "missed"
    before = f"{hours['before']:.2f} h" if "before" in hours else ""
    share = sum(value / FLOPS_PER_S[dtype] for dtype, value in work.flops.items())
    bound = f"{share / work.seconds:.0%} products, {work.launches * LAUNCH_S / work.seconds:.0%}"
    common.print_row(name, before, f"{hours['now']:.2f} h", f"{GOALS[name]:.2f} h", verdict, bound)
    return {"hours": hours, "goal_hours": GOALS[name], "flops": flops, "launches": work.launches}


def main() -> None:
    """Count the three parts."""
    args = common.start(common.parser(__doc__, quick="the same: nothing is computed"))
    print("rates: " + ", ".join(f"{v / 1e12:.0f} TFLOP/s {k}" for k, v in FLOPS_PER_S.items()))
    common.print_header("part", "before", "now", "goal", "", "products, launches")
    figures = {}
    root = Path("unused")
    with as_on_a_gpu():
        for part, name in ((library, "H100"), (score, "H100"), (uptrain, "H200")):
            figures[part.__name__] = part(open_run(name, root))
    common.print_json(args, figures)


if __name__ == "__main__":
    main()
