"""The recipe: every setting of every stage, strictly checked.

An unknown key is an error that names its neighbours. A recipe is a YAML file with one section per
stage; what it leaves out keeps the default below. `--set a.b=c` overrides a dotted key. The
resolved recipe is written to `RUN/run.yaml`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from puzzle import settings
from puzzle.config.search import (
    CONSTRAINTS,
    TARGETS,
    Constrained,
    LessIsBetter,
    MoreIsBetter,
    SearchConfig,
    with_constraints,
)
from puzzle.config.section import (
    Fraction,
    Name,
    PathOrName,
    Positive,
    Section,
    check_name,
    expanded,
    is_name,
)

__all__ = [
    "CONSTRAINTS",
    "TARGETS",
    "Constrained",
    "LessIsBetter",
    "MoreIsBetter",
    "SearchConfig",
    "check_name",
    "expanded",
    "is_name",
    "with_constraints",
]
YAML_SUFFIXES = (".yaml", ".yml")
Target = Literal["vllm", "vllm-plugin", "llama.cpp", "transformers"]  # what serves children


class SourceConfig(Section):
    """Where text comes from. In YAML: `stdlib`, `parent`, a path, or a mapping with one of four."""

    stdlib: bool = False
    parent: bool = False  # text that the parent itself writes, for parents whose data nobody has
    path: PathOrName | None = None
    dataset: str | None = None
    subset: str | None = None
    revision: str | None = None  # of the dataset: a branch, tag or commit; if None, its newest
    split: str = "train"
    text_column: str = "text"
    messages_column: str = "messages"
    weight: float = Field(default=1.0, gt=0)
    # Of `parent`: a file of prompts, one a line or JSON Lines with `text_column`; default: from the
    # beginning of a text.
    prompts: PathOrName | None = None
    document_tokens: Positive = 512  # that it writes at most for each
    temperature: float = Field(default=1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: object) -> object:
        if isinstance(value, str):
            return {value: True} if value in ("stdlib", "parent") else {"path": value}
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> "SourceConfig":
        given = {
            "stdlib": self.stdlib,
            "parent": self.parent,
            "path": self.path,
            "dataset": self.dataset,
        }
        named = [name for name, value in given.items() if value]
        if len(named) != 1:
            raise ValueError(
                f"got {' and '.join(named) or 'none of them'}; a source is exactly one of stdlib, "
                "parent, path, dataset"
            )
        return self

    @property
    def label(self) -> str:
        """The source's name in messages and fingerprints."""
        if self.stdlib or self.parent:
            return "stdlib" if self.stdlib else "parent"
        return str(self.path or self.dataset)


class CorpusConfig(Section):
    """What is packed once and read by every stage.

    Stages that want more than `train_tokens` see them again.
    """

    sources: list[SourceConfig] = Field(
        default_factory=lambda: [SourceConfig(stdlib=True)], min_length=1
    )
    sequence_length: Annotated[int, Field(ge=2)] = 256
    train_tokens: Positive = 4_000_000
    # Share of the documents that training never sees: a quarter of them for block scores, a quarter
    # for what chooses weights, half for tests.
    held_out_fraction: Fraction = 0.04
    held_out_tokens: Positive = 262_144  # of them, at most, shared in the same way
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_parent(self) -> "CorpusConfig":
        if sum(source.parent for source in self.sources) > 1:
            raise ValueError(
                "sources: got `parent` more than once; expected it once at most: put all prompts "
                "into one file"
            )
        return self


class LayerOverride(Section):
    """The variants one layer may use besides the parent's; the word `parent` stands for none."""

    attention: list[str] = []
    ffn: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: object) -> object:
        return {} if value == "parent" else value


class LibraryConfig(Section):
    """The search space and its training by blockwise local distillation."""

    kv_heads: Literal["divisors"] | list[Positive] = "divisors"
    attention_replacements: list[Literal["linear", "no_op"]] = ["linear", "no_op"]
    ffn_percent: list[Annotated[float, Field(gt=0, le=100)]] = [87, 75, 62, 50, 37, 25, 20, 10]
    ffn_multiple: Positive = 32
    ffn_replacements: list[Literal["linear", "no_op"]] = ["linear", "no_op"]
    layers: dict[int, LayerOverride] = {}
    # Blocks of each layer that a first search keeps and that are then trained as pairs; 0: none.
    coupled: int = Field(default=0, ge=0)
    initialization: Literal["training_free", "least_squares"] = "least_squares"
    tokens: Positive = 600_000
    # Tokens where they differ: of all attentions or FFNs, or by variant name, e.g.
    # {attention: 400_000, ffn.linear: 1_000_000}.
    budgets: dict[str, Positive] = {}
    # Stop below this relative gain of validation loss in each of `stop_patience` chunks; 0: never.
    stop_when_flat: float = Field(default=0.0, ge=0, lt=1)
    stop_patience: Positive = 2
    batch_sequences: Positive = 16
    # The rate of variants that start at FULL_RATE_NMSE or above (library/bld.py).
    # Default: 2e-3, less for parents wider than 256 (training/schedules.py).
    learning_rate: float | None = Field(default=None, gt=0)
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    gradient_clip: float = Field(default=1.0, gt=0)
    calibration_sequences: Positive = 32
    validation_sequences: Positive = 32
    # Batches that pass one layer before the next layer starts: 32, or where the library is streamed
    # as many as the host's memory holds. An interruption repeats at most one layer of a chunk.
    chunk_steps: Literal["auto"] | Positive = "auto"
    memory: Literal["auto", "resident", "streamed"] = "auto"


def _none_or_some(count: int) -> int:
    if count < 0 or 0 < count < 4:
        raise ValueError("expected 0, or at least 4")
    return count


class ScoreConfig(Section):
    """Replace-1-block scores.

    `metric` is what the search adds up; the others are recorded beside it.
    """

    method: Literal["exact", "fisher", "hybrid"] = "exact"
    metric: Literal["kl", "lm_loss", "top1", "top5", "top10", "cosine", "task"] = "kl"
    # subblock: a block's loss is the sum of its two subblocks'.
    granularity: Literal["block", "subblock"] = "block"
    sequences: Positive = 32
    shard_sequences: Positive = 8
    tokens_per_pass: Positive = 16_384
    fisher_samples: Positive = 16  # predictions drawn for every sequence
    memory: Literal["auto", "resident", "streamed"] = "auto"  # streamed: layer by layer from disk
    # Children that `puzzle run` assembles in memory, to know which KL a sum of scores stands for;
    # 0, or any from 4 on.
    assembled: Annotated[int, AfterValidator(_none_or_some)] = 16
    # held-out, a JSON Lines file of multiple-choice questions, or a task of lm-eval.
    task: PathOrName | None = None
    task_questions: Positive = 64

    @model_validator(mode="after")
    def _consistent(self) -> "ScoreConfig":
        if self.metric == "task" and self.task is None:
            raise ValueError("metric task needs a task, for example task: held-out")
        if self.method == "fisher" and self.metric != "kl":
            raise ValueError(
                f"method fisher estimates the KL only; got metric {self.metric}, "
                "use exact or hybrid"
            )
        return self


class ScenarioConfig(Section):
    """How the model will be served. Lengths in tokens."""

    batch_size: Positive = 64
    input_length: Positive = 64
    output_length: Positive = 64
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tensor_parallel: Positive = 1  # devices that serve together

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.input_length} tokens in, {self.output_length} out"


class CostConfig(Section):
    """Where costs are measured.

    `auto` is vllm where it is installed, otherwise the built-in torch engine.
    """

    engine: Literal["auto", "vllm", "torch", "roofline"] = "auto"
    device_sheet: PathOrName = "this-cpu"
    scenario: ScenarioConfig = ScenarioConfig()  # called `main`
    # Further batch sizes of `main`; the search takes the one with the best child.
    batch_sizes: list[Positive] = []
    # Further scenarios by name, in which the constraints must hold, too.
    scenarios: dict[Name, ScenarioConfig] = {}
    # Standard error of a variant's seconds, as a share of a parent's block.
    precision: float = Field(default=0.01, gt=0)
    # Seconds of serving for each scenario and batch size; less where `precision` is reached before,
    # more where there are too few samples for a fit.
    seconds: float = Field(default=120.0, gt=0)
    # Starts of the engines before a measurement of parent and child is looked at. What is not
    # decided then goes on for as many again, twice at most.
    starts: Annotated[int, Field(ge=2)] = 4
    # The costs.jsonl of another run, taken instead of measuring.
    table: PathOrName | None = None

    @model_validator(mode="after")
    def _names(self) -> "CostConfig":
        if "main" in self.scenarios:
            raise ValueError("scenarios: `main` is the one under `scenario`; choose another name")
        return self

    @property
    def sweep(self) -> dict[str, ScenarioConfig]:
        """The main scenario at each of its batch sizes, by the name its costs go under."""
        others = [size for size in self.batch_sizes if size != self.scenario.batch_size]
        swept = {
            self.table_of(size): self.scenario.model_copy(update={"batch_size": size})
            for size in others
        }
        return {"main": self.scenario} | swept

    def table_of(self, batch_size: int) -> str:
        """The name of the main scenario's costs at one of its batch sizes."""
        return "main" if batch_size == self.scenario.batch_size else f"main@{batch_size}"

    @property
    def measured(self) -> dict[str, ScenarioConfig]:
        """Everything that is measured, by name."""
        return self.sweep | self.scenarios


class LengthStage(Section):
    """A part of uptraining at one sequence length, for example 8192 tokens, then 65,536."""

    # A multiple of corpus.sequence_length: neighbouring rows are joined.
    sequence_length: Annotated[int, Field(ge=2)]
    share: Annotated[float, Field(gt=0, le=1)]  # of uptrain.tokens


class UptrainConfig(Section):
    """Global knowledge distillation of the child. Weights of 0 leave a term out."""

    tokens: Positive = 1_500_000
    stages: list[LengthStage] = []  # sequence lengths, one after the other
    # In sequences of corpus.sequence_length, of all processes together.
    batch_sequences: Positive = 16
    # What is left out of these three is chosen so that it fits the memory (uptrain/memory.py):
    # sequences of one forward and backward pass in each process, whose gradients add up; whether
    # layers are computed again in the backward pass; whether float32 weights and moments are in the
    # device's memory or in the host's.
    micro_batch_sequences: Positive | None = None
    activation_checkpointing: bool | Literal["auto"] = "auto"
    optimizer_memory: Literal["auto", "device", "host"] = "auto"
    # Layers by torch.compile; auto: on CPUs, where it pays (uptrain/compiled.py).
    compile: bool | Literal["auto"] = "auto"
    seed: int = Field(default=0, ge=0)  # of the order of the data; 0 goes on where BLD stopped
    # muon: of the layers' matrices; what else learns, and adapters, do so by AdamW.
    optimizer: Literal["muon", "adamw"] = "muon"
    # Default: 4e-3 for Muon (AdamW beside it has a quarter), 1e-3 for AdamW; less for parents wider
    # than 256 (training/schedules.py).
    learning_rate: float | None = Field(default=None, gt=0)
    # wsd: constant, then linear to zero over `decay_share`.
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    decay_share: float = Field(default=0.2, gt=0, le=1)
    gradient_clip: float = Field(default=1.0, gt=0)
    cosine_weight: float = Field(default=1.0, ge=0)
    kl_weight: float = Field(default=1.0, ge=0)
    lm_weight: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    train: Literal["all", "replaced"] = "all"  # replaced: only blocks that are not the parent's
    # Patterns of weights that stay, e.g. ["*embed_tokens*", "model.layers.0.*"].
    freeze: list[str] = []
    # 0: the weights themselves learn; otherwise low-rank adapters, merged at the end.
    lora_rank: int = Field(default=0, ge=0)
    lora_alpha: float = Field(default=16.0, gt=0)
    validate_steps: Positive = 50
    checkpoint_minutes: float = Field(default=10.0, ge=0)
    checkpoint_steps: Positive | None = None  # instead: every so many steps
    # Stop after so many validations without a better KL; 0: never.
    patience: int = Field(default=0, ge=0)
    keep: Literal["best", "last"] = "best"  # whose weights become the result, by the validation KL
    wandb: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "UptrainConfig":
        if not self.cosine_weight and not self.kl_weight and not self.lm_weight:
            raise ValueError(
                "cosine_weight, kl_weight and lm_weight are all 0: there is nothing to learn; "
                "set one of them"
            )
        if self.schedule == "wsd" and self.warmup_share + self.decay_share > 1:
            raise ValueError("warmup_share + decay_share exceed 1; lower one of them")
        whole = sum(stage.share for stage in self.stages)
        if self.stages and abs(whole - 1) > 1e-6:
            raise ValueError(f"the shares of stages add up to {whole:g}; expected 1")
        return self


class HarnessTask(Section):
    """A task of lm-evaluation-harness: its name, or the path of a YAML file in its format."""

    task: str
    shots: Annotated[int, Field(ge=0)] | None = None  # default: the task's own
    limit: Positive | None = None  # documents at most

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: object) -> object:
        return {"task": value} if isinstance(value, str) else value

    @property
    def label(self) -> str:
        """How its results are named: the task, and its shots where they are given."""
        path = Path(self.task)
        return self.with_shots(path.stem if path.suffix in YAML_SUFFIXES else self.task)

    def with_shots(self, name: str) -> str:
        """`mmlu-5-shot` where shots are given, `mmlu` where they are the task's own."""
        return name if self.shots is None else f"{name}-{self.shots}-shot"


class EvaluateConfig(Section):
    """How the finished child's quality is measured, on test text."""

    sequences: Positive = 128
    batch_sequences: Positive = 8
    # Tokens of the sequences on which quality is measured by position, and of the longest local
    # questions; default: the parent's context, at most 32,768, as far as the test text goes.
    context: Annotated[int, Field(ge=2)] | None = None
    # Of each local task: cloze, copying, needle in a haystack, choice of a continuation; 0: none.
    questions: int = Field(default=32, ge=0)
    samples: int = Field(default=3, ge=0)  # texts that parent and child write
    sample_tokens: Positive = 64
    tasks: list[HarnessTask] = []  # of lm-evaluation-harness (the extra `eval`)
    memory: Literal["auto", "resident", "streamed"] = "auto"  # streamed: layer by layer from disk

    @model_validator(mode="after")
    def _distinct_tasks(self) -> "EvaluateConfig":
        labels = [task.label for task in self.tasks]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(
                    f"tasks: got two whose results would be named {label}; expected different "
                    "names or different `shots`"
                )
        return self


class PlaceConfig(Section):
    """Where children are served: by what, and the engine and scenarios that costs are of."""

    deploy: list[Target] = ["vllm", "transformers"]  # of a listed place: the recipe's
    cost: CostConfig = CostConfig()


class ChildOverride(Section):
    """What a listed child sets otherwise than the recipe's own sections.

    A child that names a constraint has none of the recipe's constraints.
    """

    place: Name | None = None
    search: dict[str, JsonValue] = {}
    uptrain: dict[str, JsonValue] = {}
    evaluate: dict[str, JsonValue] = {}


class ChildConfig(Section):
    """A wish at a place, and the settings of its own stages."""

    place: Name = "here"
    search: SearchConfig = SearchConfig()
    uptrain: UptrainConfig = UptrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


class Recipe(Section):
    """Everything a run needs. Field order is stage order.

    `deploy` and `cost` describe the place called `here`; `search`, `uptrain` and `evaluate` the
    child called `main`, or what the listed children have in common.
    """

    parent: PathOrName = "pocket"
    out: PathOrName = "runs/default"
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # That share the work of library, score, uptrain and evaluate; auto: one for each GPU of this
    # machine, one on a CPU.
    processes: Literal["auto"] | Positive = "auto"
    deploy: list[Target] = ["vllm", "transformers"]
    corpus: CorpusConfig = CorpusConfig()
    library: LibraryConfig = LibraryConfig()
    score: ScoreConfig = ScoreConfig()
    cost: CostConfig = CostConfig()
    search: SearchConfig = SearchConfig()
    uptrain: UptrainConfig = UptrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    places: dict[Name, PlaceConfig] = {}
    children: dict[Name, ChildOverride] = {}

    @model_validator(mode="after")
    def _deploy_of_places(self) -> "Recipe":
        """A listed place that names no `deploy` has the recipe's, so that it adds no blocks."""
        for name, place in self.places.items():
            if "deploy" not in place.model_fields_set:
                self.places[name] = place.model_copy(update={"deploy": self.deploy})
        return self

    @model_validator(mode="after")
    def _names(self) -> "Recipe":
        if "here" in self.places:
            raise ValueError(
                "places: `here` is the recipe's own deploy and cost; choose another name"
            )
        for name, child in self.children.items():
            if child.place not in (None, "here", *self.places):
                known = ", ".join(("here", *self.places))
                raise ValueError(f"children.{name}: no place {child.place!r}; expected {known}")
        return self

    @model_validator(mode="after")
    def _children(self) -> "Recipe":
        self.all_children()
        return self

    def all_places(self) -> dict[str, PlaceConfig]:
        """Every place by name, `here` first."""
        return {"here": PlaceConfig(deploy=self.deploy, cost=self.cost)} | self.places

    def all_children(self) -> dict[str, ChildConfig]:
        """Every child by name: those that are listed, or `main`."""
        if not self.children:
            shared = {"search": self.search, "uptrain": self.uptrain, "evaluate": self.evaluate}
            return {"main": ChildConfig.model_validate(shared)}
        return {name: self._child(name, override) for name, override in self.children.items()}

    def _child(self, name: str, override: ChildOverride) -> ChildConfig:
        values = {
            "place": override.place or "here",
            "search": with_constraints(self.search.model_dump(mode="json"), override.search),
            "uptrain": self.uptrain.model_dump(mode="json") | override.uptrain,
            "evaluate": self.evaluate.model_dump(mode="json") | override.evaluate,
        }
        return settings.validate(ChildConfig, values, f"children.{name}")


def parse(
    values: Mapping[str, JsonValue], where: str = "recipe", assignments: Sequence[str] = ()
) -> Recipe:
    """A checked recipe, with changes by `--set`.

    Raises `UserError` with one line for the first thing that is wrong.
    """
    return settings.validate_changed(Recipe, values, assignments, where)
