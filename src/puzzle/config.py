"""The recipe: every setting of every stage, strictly checked. An unknown key is an error that names
its neighbours.

A recipe is a YAML file with one section per stage; what it leaves out keeps the default below.
`--set a.b=c` overrides a dotted key. The resolved recipe is written to `RUN/run.yaml`.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from puzzle.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(Section):
    """One place text comes from. In YAML: `stdlib`, a path, or a mapping with exactly one of these
    three.
    """

    stdlib: bool = False
    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"
    messages_column: str = "messages"
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"stdlib": True} if value == "stdlib" else {"path": value}
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> "SourceConfig":
        if sum((self.stdlib, self.path is not None, self.dataset is not None)) != 1:
            raise ValueError("a source is exactly one of stdlib, path, dataset")
        return self

    @property
    def label(self) -> str:
        return "stdlib" if self.stdlib else str(self.path or self.dataset)


class CorpusConfig(Section):
    """What is packed once and read by every stage; stages that want more than `train_tokens` see
    them again.
    """

    sources: list[SourceConfig] = Field(
        default_factory=lambda: [SourceConfig(stdlib=True)], min_length=1
    )
    sequence_length: Annotated[int, Field(ge=2)] = 256
    train_tokens: Positive = 4_000_000
    validation_fraction: Fraction = 0.04
    validation_tokens: Positive = 262_144
    seed: int = Field(default=0, ge=0)


class LayerOverride(Section):
    """The variants one layer may use besides the parent's; the word `parent` stands for none."""

    attention: list[str] = []
    ffn: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {} if value == "parent" else value


class LibraryConfig(Section):
    """The search space and its training by blockwise local distillation."""

    kv_heads: Literal["divisors"] | list[Positive] = "divisors"
    attention_replacements: list[Literal["linear", "no_op"]] = ["linear", "no_op"]
    ffn_percent: list[Annotated[float, Field(gt=0, le=100)]] = [87, 75, 62, 50, 37, 25, 20, 10]
    ffn_multiple: Positive = 32
    ffn_replacements: list[Literal["linear", "no_op"]] = ["linear", "no_op"]
    layers: dict[int, LayerOverride] = {}
    coupled: int = Field(
        default=0, ge=0
    )  # blocks a layer kept by a first search and then trained as pairs; 0: none
    initialization: Literal["training_free", "least_squares"] = "least_squares"
    tokens: Positive = 600_000
    budgets: dict[
        str, Positive
    ] = {}  # tokens by variant name where they differ, e.g. {linear: 1_000_000}
    stop_when_flat: float = Field(
        default=0.0, ge=0, lt=1
    )  # stop below this relative gain a chunk; 0: never
    stop_patience: Positive = 2
    batch_sequences: Positive = 16
    learning_rate: float = Field(
        default=2e-3, gt=0
    )  # of variants that start at FULL_RATE_NMSE or above (bld.py)
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    gradient_clip: float = Field(default=1.0, gt=0)
    calibration_sequences: Positive = 32
    validation_sequences: Positive = 32
    chunk_steps: Positive = (
        32  # so many batches go through a layer before the next: the unit of loss and of streaming
    )
    memory: Literal["auto", "resident", "streamed"] = "auto"


class ScoreConfig(Section):
    """Replace-1-block scores. `metric` is what the search adds up; the others are recorded beside
    it.
    """

    method: Literal["exact", "fisher", "hybrid"] = "exact"
    metric: Literal["kl", "lm_loss", "top1", "top5", "top10", "cosine", "task"] = "kl"
    granularity: Literal["block", "subblock"] = (
        "block"  # subblock: a block's loss is the sum of its two subblocks'
    )
    sequences: Positive = 32
    shard_sequences: Positive = 8
    tokens_per_pass: Positive = 16_384
    fisher_samples: Positive = 16  # predictions drawn for every sequence
    task: str | None = (
        None  # held-out, a JSON Lines file of multiple-choice questions, or a task of lm-eval
    )
    task_questions: Positive = 64

    @model_validator(mode="after")
    def _consistent(self) -> "ScoreConfig":
        if self.metric == "task" and self.task is None:
            raise ValueError("metric task needs a task, for example task: held-out")
        if self.method == "fisher" and self.metric != "kl":
            raise ValueError(
                f"method fisher estimates the KL only; got metric {self.metric}, use exact or hybrid"
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
    """Where costs are measured. `auto` is vllm where it is installed, otherwise the built-in torch
    engine.
    """

    engine: Literal["auto", "vllm", "torch", "roofline"] = "auto"
    device_sheet: str = "this-cpu"
    scenario: ScenarioConfig = ScenarioConfig()  # called `main`
    batch_sizes: list[
        Positive
    ] = []  # further ones of `main`; the search takes the one with the best child
    scenarios: dict[
        str, ScenarioConfig
    ] = {}  # further scenarios by name, in which the constraints must hold too
    precision: float = Field(
        default=0.01, gt=0
    )  # standard error of a variant, as a share of a parent's block
    seconds: float = Field(
        default=60.0, gt=0
    )  # of serving, for each scenario and batch size, unless precise before
    table: str | None = None

    @model_validator(mode="after")
    def _names(self) -> "CostConfig":
        if wrong := [
            name
            for name in self.scenarios
            if name == "main" or not name.replace("-", "_").isidentifier()
        ]:
            raise ValueError(
                f"scenarios: a name is letters, digits, - and _, and not main; got {wrong[0]!r}"
            )
        return self

    @property
    def sweep(self) -> dict[str, ScenarioConfig]:
        """The main scenario at each of its batch sizes, by the name its costs go under."""
        others = [size for size in self.batch_sizes if size != self.scenario.batch_size]
        swept = {
            f"main@{size}": self.scenario.model_copy(update={"batch_size": size}) for size in others
        }
        return {"main": self.scenario} | swept

    @property
    def measured(self) -> dict[str, ScenarioConfig]:
        """Everything that is measured, by name."""
        return self.sweep | self.scenarios


Quantity = (
    str | dict[str, str] | None
)  # one text for every scenario, or a text by the scenario's name


class SearchConfig(Section):
    """Constraints, absolute with a unit ("40GiB", "3s", "1500 tok/s") or relative to the parent
    ("2x", "50%").
    """

    throughput: Quantity = None
    latency: Quantity = None
    time_to_first_token: Quantity = None
    memory: Quantity = None
    parameters: Quantity = None
    kv_cache: Quantity = None
    changed_layers: int | None = Field(
        default=None, ge=0
    )  # at most so many may differ from the parent's
    homogeneous: bool = False  # one block everywhere, as in Minitron
    monotone: bool = False  # FFN widths never grow with depth
    frontier: Literal[
        "throughput", "latency", "time_to_first_token", "memory", "parameters", "kv_cache"
    ] = "throughput"
    points: Positive = 25
    gap: float = Field(default=1e-4, ge=0)
    solutions: Positive = 1
    diversity: Annotated[float, Field(gt=0)] = (
        0.2  # in how many layers: a share, or a number of layers from 1 on
    )
    margin: float = Field(default=0.05, ge=0, lt=0.5)
    attempts: Positive = 3
    time_limit_s: float = Field(default=60.0, gt=0)


class LengthStage(Section):
    """A part of uptraining at one sequence length, for example 8192 tokens a sequence, then 65,536."""

    sequence_length: Annotated[
        int, Field(ge=2)
    ]  # a multiple of corpus.sequence_length: neighbouring rows are joined
    tokens: Positive


class UptrainConfig(Section):
    """Global knowledge distillation of the child. Weights of 0 leave a term out."""

    tokens: Positive = 1_500_000
    stages: list[LengthStage] = []  # sequence lengths one after the other, instead of `tokens`
    batch_sequences: Positive = (
        16  # in sequences of corpus.sequence_length, of all processes together
    )
    micro_batch_sequences: Positive | None = (
        None  # at a time and process, the gradients add up; default: all at once
    )
    seed: int = Field(default=0, ge=0)  # of the order of the data; 0 goes on where BLD stopped
    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["cosine", "wsd"] = (
        "cosine"  # wsd: constant, then linear to zero over `decay_share`
    )
    warmup_share: float = Field(default=0.05, ge=0, lt=1)
    decay_share: float = Field(default=0.2, gt=0, le=1)
    gradient_clip: float = Field(default=1.0, gt=0)
    cosine_weight: float = Field(default=1.0, ge=0)
    kl_weight: float = Field(default=1.0, ge=0)
    lm_weight: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    train: Literal["all", "replaced"] = "all"  # replaced: only blocks that are not the parent's
    freeze: list[
        str
    ] = []  # patterns of weights that stay, e.g. ["*embed_tokens*", "model.layers.0.*"]
    lora_rank: int = Field(
        default=0, ge=0
    )  # 0: the weights themselves; otherwise low-rank adapters, merged at the end
    lora_alpha: float = Field(default=16.0, gt=0)
    activation_checkpointing: bool = False
    validate_steps: Positive = 50
    checkpoint_steps: Positive = 25
    patience: int = Field(
        default=0, ge=0
    )  # stop after so many validations without a better KL; 0: never
    keep: Literal["best", "last"] = "best"  # whose weights become the result, by the validation KL
    processes: Literal["auto"] | Positive = "auto"  # auto: one for each GPU, one on a CPU
    wandb: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "UptrainConfig":
        if not self.cosine_weight and not self.kl_weight and not self.lm_weight:
            raise ValueError(
                "cosine_weight, kl_weight and lm_weight are all 0: there is nothing to learn; set one"
            )
        if self.lora_rank and self.processes not in ("auto", 1):
            raise ValueError(
                f"lora_rank is for one process; got processes {self.processes}, use 1 or lora_rank: 0"
            )
        if self.schedule == "wsd" and self.warmup_share + self.decay_share > 1:
            raise ValueError("warmup_share + decay_share exceed 1; lower one of them")
        return self


class EvaluateConfig(Section):
    sequences: Positive = 128
    batch_sequences: Positive = 8
    pairs: Positive = 7


class Recipe(Section):
    """Everything a run needs. Field order is stage order."""

    parent: str = "pocket"
    out: str = "runs/default"
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    deploy: list[Literal["vllm", "vllm-plugin", "llama.cpp", "transformers", "tensorrt-llm"]] = [
        "vllm",
        "transformers",
    ]
    trust_remote_code: bool = False
    corpus: CorpusConfig = CorpusConfig()
    library: LibraryConfig = LibraryConfig()
    score: ScoreConfig = ScoreConfig()
    cost: CostConfig = CostConfig()
    search: SearchConfig = SearchConfig()
    uptrain: UptrainConfig = UptrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


# ------------------------------------------------------------------------------------------ reading


def _expected_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys allowed beside an unknown one, found by walking the recipe's sections."""
    section: Any = Recipe
    for part in location[:-1]:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return []
    return list(section.model_fields)


def _one_line(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        allowed = _expected_keys(first["loc"])
        close = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of: {', '.join(allowed)}"
        return f"{where}: unknown key {key!r}; {hint}"
    return f"{where}: {key or 'recipe'}: got {first['input']!r}; {first['msg']}"


def parse(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """A checked recipe. Raises `UserError` with one line for the first thing that is wrong."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error, where)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"recipe {path}: no such file; `puzzle run` without a recipe runs the embedded parent"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"recipe {path}: got {type(values).__name__}, expected a mapping of settings"
        )
    return values


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply `a.b=c` assignments; the value is read as YAML."""
    values = {
        key: value.copy() if isinstance(value, dict) else value for key, value in values.items()
    }
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(
                f"--set {assignment!r}: expected KEY=VALUE, for example --set search.throughput=2x"
            )
        section = values
        *parents, last = key.strip().split(".")
        for parent in parents:
            inner = section.get(parent)
            section[parent] = dict(inner) if isinstance(inner, dict) else {}
            section = section[parent]
        try:
            section[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {assignment!r}: the value is not YAML") from None
    return values
