"""The parent: found, described without its weights, and loaded as the all-parent child.

`describe` reads config and tokenizer only (what `puzzle plan` needs). `load` reads safetensors,
memory-mapped, tensor by tensor, into the child's own model class with every block the parent's;
tests hold that its logits are bitwise those of transformers. Stages therefore know one model class.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import torch
from pydantic import JsonValue
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from puzzle import artifacts
from puzzle.artifacts import Checksums, Record
from puzzle.config import expanded
from puzzle.errors import UserError, reason
from puzzle.model import block_configs, child
from puzzle.model.architecture import Architecture, ModelShape
from puzzle.model.families import family_of
from puzzle.model.modeling_puzzle import PuzzleConfig, PuzzleForCausalLM
from puzzle.model.weight_files import (
    DTYPES,
    refuse_quantised,
    refuse_quantised_tensors,
    stored_dtype,
    stored_tensors,
    weight_files,
)
from puzzle.model.weights import WHOLE, Tensors, Weights

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
DESCRIPTION = "parent.json"
HUB_FILES = [
    "*.json",
    "*.safetensors",
    "tokenizer*",
    "*.model",
    "*.jinja",
    "merges.txt",
    "LICENSE*",
    "N[Oo]*",  # NOTICE in any spelling
    "*.md",
]
LARGEST = {  # sizes in a config.json, and what no model exceeds
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 40,
}
NOT_OF_THE_HUB = ["*/*", "consolidated*", "adapter*"]  # the same weights in another form, or none


class ParentRecord(Record):
    """`parent.json`: what a folder without weights must say of the parent it describes."""

    name: str
    fingerprint: str
    tokenizer_fingerprint: str
    dtype: str
    files: dict[str, str]  # fingerprints of the files beside it


@dataclass(frozen=True)
class Parent:
    """Where a parent is and what it looks like."""

    name: str
    folder: Path
    shape: ModelShape
    hf_config: PretrainedConfig
    checksums: Checksums = field(default_factory=Checksums, repr=False, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """Of config and weights, every byte of them."""
        if (self.folder / DESCRIPTION).exists():
            return ParentRecord.read(self.folder / DESCRIPTION).fingerprint
        marks = {path.name: self.checksums.of(path) for path in weight_files(self.folder)}
        config = artifacts.file_fingerprint(self.folder / "config.json")
        return artifacts.fingerprint({"config": config, "weights": marks})

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """As transformers loads it. Raises `UserError` where it cannot, or has no end of text."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:
            if "custom code" in str(error):
                raise UserError(
                    f"parent {self.name}: its tokenizer needs code of its own (auto_map in "
                    "tokenizer_config.json), which is never run; expected one that transformers "
                    "knows, as tokenizer.json"
                ) from None
            raise UserError(
                f"parent {self.name}: cannot load its tokenizer: {reason(error)}; expected "
                "tokenizer.json and tokenizer_config.json as transformers writes them"
            ) from None
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"parent {self.name}: its tokenizer has no end-of-text token; set eos_token"
            )
        return tokenizer

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Of the files that decide how text becomes tokens."""
        if (self.folder / DESCRIPTION).exists():
            return ParentRecord.read(self.folder / DESCRIPTION).tokenizer_fingerprint
        paths = [self.folder / name for name in TOKENIZER_FILES if (self.folder / name).exists()]
        return artifacts.fingerprint(
            {path.name: artifacts.file_fingerprint(path) for path in paths}
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which the child keeps."""
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @cached_property
    def dtype_name(self) -> str:
        """`bfloat16`, `float16` or `float32`: of the config or, where it says none, the files."""
        configured = getattr(self.hf_config, "dtype", None)
        if configured is not None:
            return str(configured).removeprefix("torch.")
        if (self.folder / DESCRIPTION).exists():
            return ParentRecord.read(self.folder / DESCRIPTION).dtype
        return stored_dtype(self.folder)

    def child_config(
        self, architecture: Architecture, windows: Sequence[int | None] | None = None
    ) -> PuzzleConfig:
        """The config of a child, or of some layers.

        Args:
            architecture: the blocks.
            windows: the sliding window of every block, in tokens; the parent's own if None.
        """
        windows = self.shape.windows if windows is None else windows
        blocks = block_configs.write(architecture, self.shape.num_attention_heads, windows)
        settings = family_of(self.hf_config.model_type).settings(self.hf_config)
        config = PuzzleConfig(**settings, block_configs=blocks, dtype=self.dtype)
        config.num_hidden_layers = len(architecture)
        return config

    @cached_property
    def _tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the all-parent child, by name."""
        with _understanding(self.name):
            config = self.child_config(Architecture.of_parent(self.shape))
            model = child.skeleton(config, torch.device("cpu"), "sdpa")
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def _tensors(self, stored: str) -> Tensors:
        """Where a stored tensor goes; nowhere if the model has none of that name."""
        tensors = family_of(self.hf_config.model_type).tensors(stored, self.hf_config)
        return [(name, rows) for name, rows in tensors if name in self._tensor_shapes]

    def weights(self) -> Weights:
        """The parent's tensors under a child's names, without those that no child has."""
        return Weights(self.folder, self._tensors)

    def check_weights(self) -> None:
        """Compare the headers of the weights with the config; no tensor is read.

        Raises `UserError` for weights that are missing, quantised, or of another model.
        """
        if (self.folder / DESCRIPTION).exists():
            return  # no weights on this machine
        stored = stored_tensors(self.folder)
        refuse_quantised_tensors(self.name, stored)
        missing = dict(self._tensor_shapes)
        if self.hf_config.tie_word_embeddings:
            missing.pop("lm_head.weight", None)
        for key, tensor in stored.items():
            parts = self._tensors(key)
            if not parts and _layer_of(key) >= self.shape.num_hidden_layers:
                raise self._contradiction(
                    f"{key} is there, but config.json says {self.shape.num_hidden_layers} layers"
                )
            expected = self._stored_shape(parts)
            if expected not in (None, tensor.shape):
                raise self._contradiction(
                    f"{key} is {_by(tensor.shape)} in {tensor.path.name}, but {_by(expected)} by "
                    "config.json"
                )
            for name, _ in parts:
                missing.pop(name, None)
        for name in missing:
            raise self._contradiction(
                f"{name} is missing; is a shard, or is config.json another's?"
            )

    def _stored_shape(self, parts: Tensors) -> tuple[int, ...] | None:
        """The shape of a stored tensor that holds these parts; None where it holds none."""
        shapes = [self._tensor_shapes[name] for name, _ in parts]
        if not shapes:
            return None
        if parts[0][1] == WHOLE:
            return shapes[0]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _contradiction(self, what: str) -> UserError:
        return UserError(f"parent {self.name}: weights and config.json differ: {what}")

    def load(
        self, dtype: torch.dtype, device: torch.device, attention: str = "sdpa"
    ) -> PuzzleForCausalLM:
        """The parent as the all-parent child, in evaluation mode, without gradients."""
        config = self.child_config(Architecture.of_parent(self.shape))
        model = child.build(config, self.weights(), dtype, device, attention)
        return model.requires_grad_(False)


def _layer_of(name: str) -> int:
    """The layer that a tensor's name says it is of; -1 where it says none."""
    parts = name.split(".")
    is_of_layer = len(parts) > 3 and parts[:2] == ["model", "layers"] and parts[2].isdecimal()
    return int(parts[2]) if is_of_layer else -1


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _weights_mark(path: Path) -> str:
    size = path.stat().st_size
    if size <= 1 << 30:
        return artifacts.file_fingerprint(path)
    with path.open("rb") as file:
        header = file.read(1 << 20)
        file.seek(size // 2)
        return artifacts.fingerprint([size, header.hex(), file.read(1 << 20).hex()])


def locate(name: str) -> Path:
    """The folder of `pocket`, of a local folder's name, or of a model on the Hugging Face hub.

    A model of the hub is downloaded to the hub's cache. Raises `UserError` where there is none.
    """
    if name == "pocket":
        return Path(str(files("puzzle") / "pocket" / "model"))
    folder = expanded(Path(name))
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"parent {name!r}: no such folder; expected `pocket`, a folder, or a hub name like "
            "org/model"
        )
    from huggingface_hub import snapshot_download

    try:
        downloaded = snapshot_download(
            name, allow_patterns=HUB_FILES, ignore_patterns=NOT_OF_THE_HUB
        )
    except Exception as error:
        raise UserError(
            f"parent {name!r}: neither a folder here nor reachable on the hub "
            f"({type(error).__name__})"
        ) from None
    return Path(downloaded)


def write_description(parent: Parent, folder: Path) -> None:
    """Write what another machine needs to measure costs for this parent: all but the weights."""
    names = ("config.json", *child.CARRIED_OVER)
    paths = [parent.folder / name for name in names if (parent.folder / name).exists()]
    record = ParentRecord(
        name=parent.name,
        fingerprint=parent.fingerprint,
        tokenizer_fingerprint=parent.tokenizer_fingerprint,
        dtype=parent.dtype_name,
        files={path.name: artifacts.file_fingerprint(path) for path in paths},
    )
    if _is_described(folder, record):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copyfile(path, folder / path.name)
    record.write(folder / DESCRIPTION)


def _is_described(folder: Path, record: ParentRecord) -> bool:
    try:
        return _undamaged(folder) == record
    except UserError:
        return False


def _undamaged(folder: Path) -> ParentRecord:
    """The record of a description. Raises `UserError` where one of its files is damaged."""
    record = ParentRecord.read(folder / DESCRIPTION)
    for name, expected in record.files.items():
        path = folder / name
        if not path.exists() or artifacts.file_fingerprint(path) != expected:
            raise UserError(f"{path}: is damaged; `puzzle run` with the parent at hand mends it")
    return record


def read_description(folder: Path) -> Parent:
    """A parent from a folder that `write_description` has written."""
    name = _undamaged(folder).name
    return replace(describe(str(folder)), name=name)


def is_here(name: str) -> bool:
    """Whether a parent's folder exists on this machine, or its model can be downloaded."""
    try:
        locate(name)
    except UserError:
        return False
    return True


def describe(name: str, checksums: Checksums | None = None) -> Parent:
    """A parent from its config only. Raises `UserError` for a missing or unsupported one.

    `checksums` remembers those of its files.
    """
    folder = locate(name)
    if not (folder / "config.json").exists():
        raise UserError(f"parent {folder}: no config.json; expected a Hugging Face model folder")
    raw = artifacts.read_object(folder / "config.json")
    refuse_quantised(name, folder, raw)
    check_config(name, raw)
    with _understanding(name):
        family = family_of(str(raw["model_type"]))
        # a supported family needs no code of the folder's, whatever its auto_map says
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        longest = config.max_position_embeddings
        windows = tuple(
            None if window is None or window >= longest else window
            for window in family.windows(config)
        )
        settings = PuzzleConfig(**family.settings(config))
        seen = shape(settings, family.blocks(config), windows)
    return Parent(name, folder, seen, config, checksums or Checksums())


def check_config(name: str, config: Mapping[str, JsonValue]) -> None:
    """Raise `UserError` for what no config.json of a model says: no type, sizes, a dtype."""
    if config.get("model_type") is None:
        raise UserError(
            f"parent {name}: config.json: no model_type; expected that of a Hugging Face model"
        )
    for key in ("dtype", "torch_dtype"):
        dtype = config.get(key)
        if dtype is not None and str(dtype).removeprefix("torch.") not in (
            *DTYPES.values(),
            "auto",
        ):
            raise UserError(
                f"parent {name}: config.json: {key}: got {dtype!r:.80}; expected one of "
                f"{', '.join(DTYPES.values())}"
            )
    for key, most in LARGEST.items():
        size = config.get(key)
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= most:
            raise UserError(
                f"parent {name}: config.json: {key}: got {size!r:.80}; expected a whole number "
                f"from 1 to {most:,}"
            )
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    width, head = config.get("hidden_size"), config.get("head_dim")
    if head is None and isinstance(width, int) and isinstance(heads, int) and width % heads:
        raise UserError(
            f"parent {name}: config.json: hidden_size {width} is no multiple of {heads} attention "
            "heads; expected one, or head_dim"
        )
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise UserError(
            f"parent {name}: config.json: {heads} attention heads cannot share {groups} KV heads "
            "equally; is it the config of these weights?"
        )


@contextlib.contextmanager
def _understanding(name: str) -> Iterator[None]:
    """Whatever a stranger's config makes transformers or a family raise is one line."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("parent:", f"parent {name}:", 1)) from None
    except Exception as error:
        raise UserError(
            f"parent {name}: config.json cannot be understood ({reason(error)}); "
            "expected the config of a Hugging Face model"
        ) from None


def shape(
    config: PuzzleConfig, architecture: Architecture, windows: Sequence[int | None] = ()
) -> ModelShape:
    """What costs and spaces need to know of a model with these settings and blocks."""
    heads = max(block.attention.kv_heads for block in architecture)
    width = max(block.ffn.intermediate_size for block in architecture)
    differ = len(set(architecture.blocks)) > 1 or not heads or not width
    return ModelShape(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=heads or config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        intermediate_size=width or config.intermediate_size,
        blocks=architecture.blocks if differ else (),
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_word_embeddings,
        qkv_bias=config.qkv_bias,
        output_bias=config.attention_bias,
        qk_norm=config.qk_norm,
        norms=2 if config.norm_placement == "both" else 1,
        windows=tuple(windows) if any(windows) else (),
        stock=child.stock(config) and not any(windows),
    )
