"""On a GPU: the pipeline, and the stages at the shapes of Llama-3.1-8B against `puzzle plan`.

    python benchmarks/gpu.py [PART...] [--device cuda:0] [--layers N] [--json]
    python benchmarks/gpu.py --device cpu --quick [--json]

Weights are random and made on the device, text is random: nothing is downloaded. Without PART, all
parts run one after the other; each takes less than ten minutes.

    pipeline  the embedded parent from library to report: seconds of every stage, the result
    library   BLD of all variants of every layer: tokens/s, peak memory
    score     exact and Fisher scores: ms a block, peak memory
    uptrain   steps of distillation: tokens/s, peak memory
    evaluate  quality of one child: tokens/s, peak memory
    costs     vLLM: costs measured with graphs against an architecture that is served, 128/128
    child     vLLM: the parent against a child of half its layers' cost, 128/1024

Peak memory is what torch has allocated, beside what the stage's own estimate says for as many
layers. Checkpoints are not written while a stage is timed. Results go to `benchmarks/results/gpu/`,
one file a part. Without a GPU one line says so, and the exit code is 2.
"""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
from transformers import AutoTokenizer, LlamaConfig

from puzzle import artifacts, config, pipeline
from puzzle.cost import COST, table
from puzzle.cost.probe import write_checkpoint
from puzzle.data.sequences import Sequences
from puzzle.device import Device
from puzzle.engines import Engine, machine, unavailable
from puzzle.engines.turns import Measurement, Served, measure_pair
from puzzle.errors import UserError
from puzzle.evaluate import results as evaluation
from puzzle.evaluate.quality import Text, unit_sums
from puzzle.evaluate.stage import WORK as EVALUATION
from puzzle.library.stage import WORK as LIBRARY_WORK
from puzzle.library.stage import make_trainers
from puzzle.library.training import LibraryTraining
from puzzle.model import child, parent, variants
from puzzle.model.architecture import NO_ATTENTION, Architecture, Block, Subblock
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.model.parent import Parent, locate
from puzzle.progress import Progress
from puzzle.run import Run
from puzzle.score.exact import LoadBlocks, Scorer, Shard, parent_states
from puzzle.score.fisher import Estimator
from puzzle.score.modules import LibraryBlocks
from puzzle.score.stage import WORK as SCORING
from puzzle.stage import Job, Need
from puzzle.uptrain.stage import WORK as UPTRAINING
from puzzle.uptrain.stage import distil
from puzzle.uptrain.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "gpu"
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
Settings = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """What is measured on: a parent's sizes, layers by part, text."""

    device: str
    sizes: Settings
    layers: dict[str, int]
    sequence_length: int
    rows: int  # of a batch
    steps: int

    @classmethod
    def of(cls, device: str, *, quick: bool, layers: int | None = None) -> "Scale":
        if quick:
            return cls(device, TINY, dict.fromkeys(PARTS, layers or 2), 64, 4, 2)
        # as many as fit 80 GiB: 16 bytes a weight that learns
        fitting = {"library": 1, "score": 8, "uptrain": 8, "evaluate": 8}
        each = {part: layers or fitting.get(part, 32) for part in PARTS}
        return cls(device, LLAMA_8B, each, 2048, 16, 4)

    def recipe(self, **sections: Settings) -> Settings:
        rows = {"batch_sequences": self.rows}
        tokens = self.steps * self.rows * self.sequence_length
        library = {
            "ffn_percent": [87, 75, 50, 25, 20, 10],
            "ffn_multiple": 256 if self.sizes is LLAMA_8B else 32,
            "tokens": tokens,
            "chunk_steps": self.steps,
            "calibration_sequences": self.rows,
            "validation_sequences": self.rows,
            **rows,
        }
        quiet = {"checkpoint_steps": 1000, "validate_steps": 1000, "keep": "last"}
        made = {
            "device": self.device,
            "deploy": ["vllm-plugin"],
            "corpus": {"sequence_length": self.sequence_length},
            "library": library,
            "score": {"sequences": 8, "shard_sequences": 8},
            "uptrain": {"tokens": tokens, **rows, **quiet},
            "evaluate": {"sequences": 2 * self.rows},
        }
        return made | {name: made.get(name, {}) | values for name, values in sections.items()}


class RandomText(Sequences):
    """Random tokens instead of a packed corpus."""

    def __init__(self, length: int, vocabulary: int) -> None:
        self.sequence_length, self.vocabulary = length, vocabulary

    def __len__(self) -> int:
        return 1 << 20

    def view(self, join: int = 1, seed: int = 0) -> "RandomText":
        return RandomText(self.sequence_length * join, self.vocabulary)

    def batch(self, step: int, size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        size_BS = (size, self.sequence_length)
        return torch.randint(self.vocabulary, size_BS, generator=generator)

    def head(self, count: int) -> torch.Tensor:
        return self.batch(0, count)

    def head_documents(self, count: int) -> torch.Tensor:
        return torch.arange(count)[:, None].expand(count, self.sequence_length).contiguous()

    def head_counted(self, count: int) -> torch.Tensor:
        return torch.ones(count, self.sequence_length, dtype=torch.bool)


class OpenedWeights(child.RandomWeights):
    """Random weights that are read as those in a parent's files are: inside a `with` block."""

    def __enter__(self) -> "OpenedWeights":
        return self

    def __exit__(self, *exception: object) -> None: ...


class MadeParent(Parent):
    """A parent whose weights are drawn on a device whenever they are read."""

    on = torch.device("cpu")

    def weights(self) -> Any:
        architecture = Architecture.of_parent(self.shape)
        return OpenedWeights(self.child_config(architecture), self.on)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        return "random"


def made_run(scale: Scale, part: str, root: Path, **sections: Settings) -> Run:
    """A run on a parent of random weights; `root` gets its config and a tokenizer."""
    folder = root / f"parent-{scale.layers[part]}"
    llama = LlamaConfig(
        num_hidden_layers=scale.layers[part],
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],
        **scale.sizes,
    )
    llama.save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate("pocket")).save_pretrained(folder)
    recipe = config.parse(scale.recipe(**sections) | {"parent": str(folder)})
    run = Run(recipe, root / f"run-{part}", Progress(quiet=scale.sizes is TINY))
    made = MadeParent(**vars(parent.describe(str(folder))))
    MadeParent.on = run.device.torch_device
    text = RandomText(scale.sequence_length, made.shape.vocab_size)
    sides = dict.fromkeys(("train", "score", "validation", "test"), text)
    run.__dict__.update(parent=made, corpus=sides)
    return run


# ----------------------------------------------------------------------------------- measuring


@dataclass
class Taken:
    """Time and memory of a stretch of work."""

    seconds: float = 0.0
    peak_bytes: int | None = None


@contextlib.contextmanager
def taking(device: Device) -> Iterator[Taken]:
    """Time and peak memory of what is inside, beginning with an empty device."""
    taken, gpu = Taken(), device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with timing(device, taken):
        yield taken
    if gpu:
        taken.peak_bytes = int(torch.cuda.max_memory_allocated())


@contextlib.contextmanager
def timing(device: Device, taken: Taken) -> Iterator[None]:
    """Adds the seconds of what is inside, its kernels included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken.seconds += time.perf_counter() - began


def no_checkpoints() -> contextlib.AbstractContextManager[object]:
    """Nothing is written while a stage is timed, nor read by it."""
    return mock.patch.multiple(
        "puzzle.training.checkpoint", save=lambda *a, **k: None, restore=lambda *a: (0, {})
    )


def made_variants(run: Run) -> contextlib.AbstractContextManager[object]:
    """Random weights on the device for the library's variants."""

    def read_state(run: Run, layer: int, variant: Subblock, state: Any) -> variants.State:
        block = run.parent.shape.parent_blocks[layer]
        if variant.kind == "no_op" or not variants.is_trained(variant, block):
            kind = type(variant)
            return variants.subblock_state(state, kind) if variant.kind != "no_op" else {}
        with torch.device("meta"):
            module = variants.block_module(run.parent, layer, variant.alone, "sdpa")
        sizes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        device = run.device.torch_device
        return {n: torch.randn(s, device=device).mul_(0.02) for n, s in sizes.items()}

    return mock.patch("puzzle.library.weights.read_state", read_state)


def compared(taken: Taken, need: Need) -> dict[str, float | None]:
    """Peak memory beside what was planned."""
    peak, planned_bytes = taken.peak_bytes, need.memory_bytes
    return {
        "peak_bytes": peak,
        "planned_bytes": planned_bytes,
        "planned_over_peak": planned_bytes / peak if peak else None,
    }


# --------------------------------------------------------------------------------------- parts


class Enough(Exception):
    """A stage has trained; what it would write does not matter."""


@contextlib.contextmanager
def trained_twice(trainer: type, again: Callable[[Any], None], device: Device) -> Iterator[Taken]:
    """`trainer.train` runs twice and counts the second time; then the stage ends.

    `again` sets it back between.
    """
    taken, train = Taken(), trainer.train

    def twice(self: Any) -> None:
        train(self)
        again(self)
        with timing(device, taken):
            train(self)
        raise Enough

    with mock.patch.object(trainer, "train", twice), contextlib.suppress(Enough):
        yield taken


def library_part(scale: Scale, root: Path) -> Settings:
    """BLD of all variants of every layer."""
    run = made_run(scale, "library", root, library={"memory": "resident"})
    job, folder = Job(run), unfinished(root / "library")

    def from_the_start(training: LibraryTraining) -> None:
        for trainer in training.trainers:
            trainer.step = 0

    with (
        no_checkpoints(),
        taking(run.device) as taken,
        trained_twice(LibraryTraining, from_the_start, run.device) as timed,
    ):
        LIBRARY_WORK.execute(job, folder)
    tokens, variants_count = run.recipe.library.tokens, len(make_trainers(run))
    return {
        "variants": variants_count,
        "tokens_per_s": tokens / timed.seconds,
        "layer_tokens_per_s": tokens * scale.layers["library"] / timed.seconds,
        **compared(taken, LIBRARY_WORK.need(job)),
    }


def score_part(scale: Scale, root: Path) -> Settings:
    """Blocks of the first layer, which the others follow, and of the last, which none follows."""
    run = made_run(scale, "score", root, score={"method": "hybrid"})
    device, last = run.device, scale.layers["score"] - 1
    seconds: dict[str, float] = {}
    with made_variants(run), taking(device) as taken:
        parent, library = run.parent_layers(streamed=False), LibraryBlocks(run, kept=True)
        for layer in range(len(parent)):  # all are kept, as `puzzle plan` counts them
            with parent.layer(layer) as of_parent:
                library.layer(layer, [], of_parent)
        tokens_BS = run.corpus["score"].head(run.recipe.score.shard_sequences)
        states, context = parent_states(run, parent, tokens_BS)
        estimator = Estimator(run, parent, tokens_BS, states, context)
        scorer = Scorer(run, parent, Shard("0", tokens_BS), states, context)

        def time_layer(name: str, layer: int, score: Callable[[LoadBlocks], object]) -> None:
            wanted = run.space.layers[layer].blocks[:PER_LAYER]
            score(partial(library.layer, layer, wanted[:1]))
            one = Taken()
            with timing(device, one):
                score(partial(library.layer, layer, wanted))
            seconds[name] = one.seconds / len(wanted)

        for name, layer in (("last", last), ("first", 0)):
            time_layer(
                f"exact_{name}",
                layer,
                lambda blocks, layer=layer: scorer.score({layer: blocks}),
            )
            time_layer(
                f"fisher_{name}",
                layer,
                lambda blocks, layer=layer: estimator.estimate(layer, blocks),
            )
    milliseconds = {f"{name}_ms_per_block": 1e3 * s for name, s in seconds.items()}
    return milliseconds | {"tokens": tokens_BS.numel()} | compared(taken, SCORING.need(Job(run)))


def uptrain_part(scale: Scale, root: Path) -> Settings:
    """Steps of distillation of a child of the parent's size, as `puzzle plan` would have them."""
    run = made_run(scale, "uptrain", root)
    job, folder = run.child_job("main"), unfinished(root / "uptrained")
    architecture = Architecture.of_parent(run.parent.shape)
    with (
        no_checkpoints(),
        mock.patch.object(child, "load", lambda folder, *where: made_child(run, *where)),
        mock.patch.object(child, "read_architecture", lambda folder: architecture),
        taking(run.device) as taken,
        trained_twice(Trainer, lambda trainer: None, run.device) as timed,
    ):
        distil(job, folder)
    tokens = job.child.uptrain.tokens
    return {"tokens_per_s": tokens / timed.seconds} | compared(taken, UPTRAINING.need(job))


def made_child(
    run: Run, dtype: torch.dtype, device: torch.device, attention: str = "sdpa"
) -> PuzzleForCausalLM:
    """A child of the parent's size."""
    config = run.parent.child_config(Architecture.of_parent(run.parent.shape))
    return child.build(config, child.RandomWeights(config, device), dtype, device, attention)


def unfinished(folder: Path) -> Path:
    """A folder as a stage finds it."""
    (folder / artifacts.UNFINISHED).mkdir(parents=True)
    return folder


def evaluate_part(scale: Scale, root: Path) -> Settings:
    """Quality of a child beside the parent."""
    run = made_run(scale, "evaluate", root)
    job, timed = run.child_job("main"), Taken()
    settings = job.child.evaluate
    with taking(run.device) as taken:
        text = Text.of(run, "test", settings.sequences)
        model = made_child(run, run.placement.dtype, run.device.torch_device)
        for _ in range(2):
            timed.seconds = 0.0
            with timing(run.device, timed):
                unit_sums(run, model, text, settings.batch_sequences)
    with mock.patch("puzzle.evaluate.memory.serving_need", lambda job: Need()):
        planned = EVALUATION.need(job)
    return {"tokens_per_s": text.tokens_NS.numel() / timed.seconds} | compared(taken, planned)


def pipeline_part(scale: Scale, root: Path) -> Settings:
    """The embedded parent, from library to report."""
    if scale.sizes is TINY:
        recipe = common.tiny_recipe(root)
    else:
        recipe = {
            "parent": "pocket",
            "deploy": ["vllm" if unavailable("vllm") is None else "transformers"],
            "corpus": {"train_tokens": 1_000_000},
            "library": {"tokens": 120_000},
            "cost": {"scenario": {"batch_size": 64}, "seconds": 30.0},
            "search": {"throughput": "1.5x"},
            "uptrain": {"tokens": 400_000},
        }
    run = common.open_run(root / "run", recipe | {"device": scale.device})
    seconds: dict[str, float] = {}
    execute_stage = pipeline.execute_stage

    def timed(stage: Any, job: Job, **more: Any) -> Any:
        taken = Taken()
        with timing(run.device, taken):
            manifest = execute_stage(stage, job, **more)
        seconds[stage.name] = seconds.get(stage.name, 0.0) + taken.seconds
        return manifest

    with mock.patch.object(pipeline, "execute_stage", timed):
        pipeline.execute(run)
    found = evaluation.read(run.child_job("main"))
    return {
        "engine": run.child_job("main").engine.name,
        "seconds": seconds,
        "retention": found.uptrained.retention,
        "verdict": found.served.verdict,
    }


def serving(scale: Scale, root: Path, part: str, output_length: int) -> Settings:
    """Costs of all variants, and an architecture that they predict against the parent, served."""
    quick = scale.sizes is TINY
    scenario = {"batch_size": 64, "input_length": 128, "output_length": output_length}
    cost = {"engine": "roofline" if quick else "vllm", "scenario": scenario, "seconds": 60.0}
    run = made_run(scale, part, root, cost=cost)
    run = replace_recipe(run, deploy=["vllm"])
    job = run.child_job("main")
    timed = Taken()
    with timing(run.device, timed):
        pipeline.execute_stage(COST, job)
    run.progress.say(f"costs took {timed.seconds:.0f} s")
    costs = table.read(job)
    shape = run.parent.shape
    of_parent = Architecture.of_parent(shape)
    architecture = half_of_the_cost(shape.parent_blocks)
    predicted = costs.predict(of_parent).total_s / costs.predict(architecture).total_s
    served = {
        name: _served(run, root / name, blocks, costs.scenario)
        for name, blocks in (("served-parent", of_parent), ("served-child", architecture))
    }
    with job.measuring():
        shown = _measure(job.engine, served["served-parent"], served["served-child"])
    return {
        "engine": job.engine.name,
        "cost_seconds": timed.seconds,
        "predicted_speedup": predicted,
        "served_speedup": shown.speedup.model_dump(),
        "parent_tok_per_s": shown.parent.throughput_tok_per_s.value,
        "child_tok_per_s": shown.child.throughput_tok_per_s.value,
        "prediction_error": predicted / shown.speedup.value - 1,
    }


def half_of_the_cost(blocks: tuple[Block, ...]) -> Architecture:
    """Every other attention left out, and every other pair of FFNs cut to a half."""
    made = []
    for index, block in enumerate(blocks):
        width = block.ffn.intermediate_size
        ffn = replace(block.ffn, intermediate_size=width // 2 if index % 4 > 1 else width)
        made.append(Block(NO_ATTENTION if index % 2 else block.attention, ffn))
    return Architecture(tuple(made))


def replace_recipe(run: Run, **changes: Any) -> Run:
    other = Run(run.recipe.model_copy(update=changes), run.folder, run.progress)
    other.__dict__.update(parent=run.parent, corpus=run.corpus)
    return other


def _served(run: Run, folder: Path, architecture: Architecture, scenario: Any) -> Served:
    weights = run.device.type != "cuda"
    write_checkpoint(run.parent, folder, architecture, weights=weights)
    length = scenario.input_length + scenario.output_length
    elements = architecture.kv_elements_per_token(run.parent.shape)
    return Served(folder, scenario, 2 * elements * scenario.batch_size * length)


def _measure(engine: Engine, of_parent: Served, of_child: Served) -> Measurement:
    return measure_pair(engine, of_parent, of_child, STARTS, lambda shown: True, lambda: None)


def costs_part(scale: Scale, root: Path) -> Settings:
    """At 128/128."""
    return serving(scale, root, "costs", 16 if scale.sizes is TINY else 128)


def child_part(scale: Scale, root: Path) -> Settings:
    """At 128/1024."""
    return serving(scale, root, "child", 32 if scale.sizes is TINY else 1024)


STARTS = 1  # of the engines: on a GPU one takes a minute
PER_LAYER = 31  # blocks of a layer that are scored: as many wait for the head together
PARTS: dict[str, Callable[[Scale, Path], Settings]] = {
    "pipeline": pipeline_part,
    "library": library_part,
    "score": score_part,
    "uptrain": uptrain_part,
    "evaluate": evaluate_part,
    "costs": costs_part,
    "child": child_part,
}
NEED_VLLM = ("costs", "child")


def run_part(name: str, scale: Scale) -> Settings:
    """The figures of a part, with the machine they are of."""
    device, count = machine(scale.device)
    with tempfile.TemporaryDirectory() as root:
        figures = PARTS[name](scale, Path(root))
    about = {"part": name, "machine": device, "devices": count, "torch": torch.__version__}
    return about | {"layers": scale.layers[name]} | figures


def main() -> None:
    options = common.parser(__doc__, "tiny shapes, nothing is written to the results")
    options.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    options.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --quick")
    options.add_argument("--layers", type=int, help="of the parent, instead of each part's own")
    asked = options.parse_args()
    if unknown := [name for name in asked.parts if name not in PARTS]:
        sys.exit(f"gpu.py: got part {unknown[0]!r}; expected one of {', '.join(PARTS)}")
    if asked.device == "cpu" and not asked.quick:
        options.error("--device cpu goes with --quick: the shapes of an 8B model are for GPUs")
    try:
        Device.choose(asked.device, "auto")
    except UserError as error:
        print(f"gpu.py: there is no GPU to measure on: {error}")
        sys.exit(2)
    args = common.start(options)
    scale = Scale.of(args.device, quick=args.quick, layers=args.layers)
    shown = []
    common.print_header("part", "figure", "value")
    for name in args.parts or PARTS:
        if name in NEED_VLLM and not args.quick and (reason := unavailable("vllm")):
            common.print_row(name, "left out", reason)
            continue
        figures = run_part(name, scale)
        for key, value in figures.items():
            common.print_row(name, key, value)
        if not args.quick:
            RESULTS.mkdir(parents=True, exist_ok=True)
            path = RESULTS / f"{name}.json"
            path.write_text(json.dumps(figures, indent=2) + "\n")
        shown.append(figures)
    common.print_json(args, shown)


if __name__ == "__main__":
    main()
