"""The parent: found, described without its weights, and loaded as the all-parent child.

`describe` reads config and tokenizer only (what `puzzle plan` needs). `load` reads safetensors,
memory-mapped, tensor by tensor, into the child's own model class with every block the parent's;
tests hold that its logits are bitwise those of transformers. Stages therefore know one model class.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from puzzle import artifacts
from puzzle.errors import UserError
from puzzle.model import child
from puzzle.model.architecture import Architecture, ModelShape
from puzzle.model.families import Tensors, family
from puzzle.model.modeling_puzzle import PuzzleConfig, PuzzleDecoderLayer, PuzzleForCausalLM


class Weights(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors checkpoint under a child's names; each is read when it is asked
    for.
    """

    def __init__(
        self, folder: Path, tensors: Callable[[str], Tensors] = lambda name: [(name, slice(None))]
    ) -> None:
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise UserError(
                f"parent {folder}: no *.safetensors file; convert the weights to safetensors first"
            )
        self._where: dict[str, tuple[Any, str, slice]] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except Exception as error:
                raise UserError(f"{path}: not a readable safetensors file ({error})") from None
            for stored in file.keys():  # noqa: SIM118 (not a dict)
                self._where |= {name: (file, stored, rows) for name, rows in tensors(stored)}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._where:
            raise UserError(f"parent: its safetensors files lack {name}; is a shard missing?")
        file, stored, rows = self._where[name]
        return (
            file.get_tensor(stored) if rows == slice(None) else file.get_slice(stored)[rows].clone()
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_: object) -> None:
        """Unmap the files; what was read of them no longer counts as memory of this process."""
        for file, _stored, _rows in self._where.values():
            file.__exit__(None, None, None)
        self._where.clear()


@dataclass(frozen=True)
class Parent:
    """Where a parent is and what it looks like."""

    name: str
    folder: Path
    shape: ModelShape
    hf_config: Any

    @cached_property
    def fingerprint(self) -> str:
        """Of config and weights; large weights are recognised by size and header, not read whole."""
        marks = {
            path.name: _weights_mark(path) for path in sorted(self.folder.glob("*.safetensors"))
        }
        config = artifacts.file_fingerprint(self.folder / "config.json")
        return artifacts.fingerprint({"config": config, "weights": marks})

    @cached_property
    def tokenizer(self) -> Any:
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
        except Exception as error:
            raise UserError(
                f"parent {self.name}: cannot load its tokenizer: {str(error).splitlines()[0]}"
            ) from None
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"parent {self.name}: its tokenizer has no end-of-text token; set eos_token"
            )
        return tokenizer

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        names = (
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "vocab.json",
            "merges.txt",
        )
        found = [self.folder / name for name in names if (self.folder / name).exists()]
        return artifacts.fingerprint(
            {path.name: artifacts.file_fingerprint(path) for path in found}
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights on disk, which the child keeps."""
        return getattr(self.hf_config, "dtype", None) or torch.float32

    def child_config(
        self, architecture: Architecture, layers: Sequence[int] | None = None
    ) -> PuzzleConfig:
        """`layers`: of the parent, whose places the blocks take, where they are not all of them in
        order.
        """
        windows = self.shape.windows
        if windows and layers is not None:
            windows = tuple(windows[layer] for layer in layers)
        blocks = architecture.block_configs(self.shape.num_attention_heads, windows)
        settings = family(self.hf_config.model_type).settings(self.hf_config)
        config = PuzzleConfig(**settings, block_configs=blocks, dtype=self.dtype)
        config.num_hidden_layers = len(architecture)
        return config

    def weights(self) -> Weights:
        tensors = family(self.hf_config.model_type).tensors
        return Weights(self.folder, lambda name: tensors(name, self.hf_config))

    def load(
        self, dtype: torch.dtype, device: torch.device, attention: str = "sdpa"
    ) -> PuzzleForCausalLM:
        """The parent as the all-parent child, in evaluation mode, without gradients."""
        config = self.child_config(Architecture.of_parent(self.shape))
        model = child.build(config, self.weights(), dtype, device, attention)
        return model.requires_grad_(False)


class ParentLayers:
    """The frozen parent, layer by layer, from a model that is in memory."""

    on_host = False  # whether activations that wait are kept in host memory

    def __init__(self, model: PuzzleForCausalLM) -> None:
        self.model = model

    def embed(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """Layer 0's input [B, S, D] and the keyword arguments every layer takes."""
        return self.model.model.embed(tokens_BS)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[PuzzleDecoderLayer]:
        yield self.model.model.layers[index]


class StreamedLayers(ParentLayers):
    """The frozen parent with at most one layer in memory, read from its files each time."""

    on_host = True

    def __init__(
        self, parent: Parent, dtype: torch.dtype, device: torch.device, attention: str
    ) -> None:
        self.parent, self.dtype, self.device = parent, dtype, device
        config = parent.child_config(Architecture.of_parent(parent.shape))
        super().__init__(child.skeleton(config, device, attention))

    def embed(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        with self.parent.weights() as weights:
            rows_BSD = weights["model.embed_tokens.weight"][
                tokens_BS.cpu()
            ]  # touches only the rows it needs
        rows_BSD = self.model.model.embed_tokens.scaled(
            rows_BSD.to(device=self.device, dtype=self.dtype)
        )
        return self.model.model.embed(inputs_embeds=rows_BSD)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[PuzzleDecoderLayer]:
        module = self.model.model.layers[index]
        prefix = f"model.layers.{index}."
        with self.parent.weights() as weights:
            state = {
                name: weights[prefix + name].to(device=self.device, dtype=self.dtype, copy=True)
                for name in module.state_dict()
            }
        module.load_state_dict(state, assign=True)
        del state
        yield module.requires_grad_(False)
        module.to("meta")


def _weights_mark(path: Path) -> str:
    size = path.stat().st_size
    if size <= 1 << 30:
        return artifacts.file_fingerprint(path)
    with path.open("rb") as file:
        header = file.read(1 << 20)
        file.seek(size // 2)
        return artifacts.fingerprint([size, header.hex(), file.read(1 << 20).hex()])


def locate(name: str) -> Path:
    """`pocket`, a local folder, or the name of a model on the Hugging Face hub (downloaded to its
    cache).
    """
    if name == "pocket":
        return Path(str(files("puzzle") / "pocket" / "model"))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"parent {name!r}: no such folder; expected `pocket`, a folder, or a hub name like org/model"
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = [
            "*.json",
            "*.safetensors",
            "tokenizer*",
            "*.model",
            "*.jinja",
            "merges.txt",
            "LICENSE*",
            "N[Oo]*",
            "*.md",
        ]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        raise UserError(
            f"parent {name!r}: neither a folder here nor reachable on the hub ({type(error).__name__})"
        ) from None


def describe(name: str, trust_remote_code: bool = False) -> Parent:
    """Read config only. Raises `UserError` for a missing, unreadable or unsupported parent."""
    folder = locate(name)
    if not (folder / "config.json").exists():
        raise UserError(f"parent {folder}: no config.json; expected a Hugging Face model folder")
    try:
        raw = artifacts.read_json(folder / "config.json")
    except ValueError as error:
        raise UserError(f"parent {folder}: config.json is not JSON ({error})") from None
    if raw.get("quantization_config"):
        raise UserError(
            f"parent {name}: its weights are quantised; give the unquantised checkpoint"
        )
    if "auto_map" in raw and not trust_remote_code:
        raise UserError(
            f"parent {name}: it brings its own code; set trust_remote_code=true if you trust it"
        )
    own = family(raw.get("model_type", "none"))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    longest = config.max_position_embeddings
    windows = tuple(
        None if window is None or window >= longest else window for window in own.windows(config)
    )
    return Parent(name, folder, shape(PuzzleConfig(**own.settings(config)), windows), config)


def shape(config: PuzzleConfig, windows: Sequence[int | None] = ()) -> ModelShape:
    """What costs and spaces need to know of a model with these settings."""
    return ModelShape(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.tie_word_embeddings,
        qkv_bias=config.qkv_bias,
        output_bias=config.attention_bias,
        qk_norm=config.qk_norm,
        norms=2 if config.norm_placement == "both" else 1,
        windows=tuple(windows) if any(windows) else (),
        stock=child.stock(config) and not any(windows),
    )
