"""The parent: found, described without its weights, and loaded as the all-parent child.

`describe` reads config and tokenizer only (what `puzzle plan` needs). `load` reads safetensors,
memory-mapped, tensor by tensor, into the child's own model class with every block the parent's;
tests hold that its logits are bitwise those of transformers. Stages therefore know one model class.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from puzzle import artifacts
from puzzle.artifacts import Checksums, Record
from puzzle.errors import UserError
from puzzle.model import block_configs, child
from puzzle.model.architecture import Architecture, ModelShape
from puzzle.model.families import family_of
from puzzle.model.modeling_puzzle import PuzzleConfig, PuzzleForCausalLM
from puzzle.model.weights import Weights

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


class ParentRecord(Record):
    """`parent.json`: what a folder without weights must say of the parent it describes."""

    name: str
    fingerprint: str
    tokenizer_fingerprint: str


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
        marks = {
            path.name: self.checksums.of(path) for path in sorted(self.folder.glob("*.safetensors"))
        }
        config = artifacts.file_fingerprint(self.folder / "config.json")
        return artifacts.fingerprint({"config": config, "weights": marks})

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """As transformers loads it. Raises `UserError` where it cannot, or has no end of text."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"parent {self.name}: cannot load its tokenizer: {reason}") from None
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
        """The dtype of the weights on disk, which the child keeps."""
        return getattr(self.hf_config, "dtype", None) or torch.float32

    @property
    def dtype_name(self) -> str:
        """`bfloat16`, `float16` or `float32`."""
        return str(self.dtype).removeprefix("torch.")

    def child_config(
        self, architecture: Architecture, layers: Sequence[int] | None = None
    ) -> PuzzleConfig:
        """The config of a child, or of some of its layers.

        Args:
            architecture: the blocks.
            layers: the parent's layers whose places the blocks take; all of them in order if None.
        """
        windows = self.shape.windows
        if windows and layers is not None:
            windows = tuple(windows[layer] for layer in layers)
        blocks = block_configs.write(architecture, self.shape.num_attention_heads, windows)
        settings = family_of(self.hf_config.model_type).settings(self.hf_config)
        config = PuzzleConfig(**settings, block_configs=blocks, dtype=self.dtype)
        config.num_hidden_layers = len(architecture)
        return config

    def weights(self) -> Weights:
        """The parent's tensors under a child's names."""
        tensors = family_of(self.hf_config.model_type).tensors
        return Weights(self.folder, lambda name: tensors(name, self.hf_config))

    def load(
        self, dtype: torch.dtype, device: torch.device, attention: str = "sdpa"
    ) -> PuzzleForCausalLM:
        """The parent as the all-parent child, in evaluation mode, without gradients."""
        config = self.child_config(Architecture.of_parent(self.shape))
        model = child.build(config, self.weights(), dtype, device, attention)
        return model.requires_grad_(False)


def locate(name: str) -> Path:
    """The folder of `pocket`, of a local folder's name, or of a model on the Hugging Face hub.

    A model of the hub is downloaded to the hub's cache. Raises `UserError` where there is none.
    """
    if name == "pocket":
        return Path(str(files("puzzle") / "pocket" / "model"))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"parent {name!r}: no such folder; expected `pocket`, a folder, or a hub name like "
            "org/model"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:
        raise UserError(
            f"parent {name!r}: neither a folder here nor reachable on the hub "
            f"({type(error).__name__})"
        ) from None


def write_description(parent: Parent, folder: Path) -> None:
    """Write what another machine needs to measure costs for this parent: all but the weights."""
    record = ParentRecord(
        name=parent.name,
        fingerprint=parent.fingerprint,
        tokenizer_fingerprint=parent.tokenizer_fingerprint,
    )
    if (folder / DESCRIPTION).exists() and ParentRecord.read(folder / DESCRIPTION) == record:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", *child.CARRIED_OVER):
        if (parent.folder / name).exists():
            shutil.copyfile(parent.folder / name, folder / name)
    record.write(folder / DESCRIPTION)


def read_description(folder: Path) -> Parent:
    """A parent from a folder that `write_description` has written."""
    name = ParentRecord.read(folder / DESCRIPTION).name
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
    if raw.get("quantization_config"):
        raise UserError(
            f"parent {name}: its weights are quantised; give the unquantised checkpoint"
        )
    family = family_of(str(raw.get("model_type", "none")))
    config = AutoConfig.from_pretrained(folder)  # a supported family needs no code of the folder's
    longest = config.max_position_embeddings
    windows = tuple(
        None if window is None or window >= longest else window for window in family.windows(config)
    )
    settings = PuzzleConfig(**family.settings(config))
    seen = shape(settings, family.blocks(config), windows)
    return Parent(name, folder, seen, config, checksums or Checksums())


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
