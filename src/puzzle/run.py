"""A run: its recipe, its directory, and what every stage needs from both (device, precision,
parent, corpus).

Stages take a `Run` and their own folder; everything expensive here is made once, when first asked
for.
"""

import contextlib
import ctypes
import gc
import os
import sys
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

from puzzle import artifacts, engines
from puzzle.config import Recipe
from puzzle.data import corpus
from puzzle.errors import UserError
from puzzle.model import parent
from puzzle.model import space as spaces
from puzzle.model.modeling_puzzle import PuzzleForCausalLM
from puzzle.progress import Progress

EAGER_UP_TO_TOKENS = (
    256  # on CPUs plain matrix products beat the fused kernel up to here (benchmarks/attention.py)
)


def keep_freed_memory() -> None:
    """Tell glibc to reuse large buffers instead of returning them: 1.3x faster training steps on
    CPUs.

    By default every activation of more than 128 KiB to 32 MiB is mapped anew, and its pages are
    zeroed on first touch.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most glibc accepts
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def return_freed_memory() -> None:
    """Give what is free back to the system, where memory matters more than speed."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class Run:
    def __init__(
        self, recipe: Recipe, folder: Path, progress: Progress, corpus_folder: Path | None = None
    ) -> None:
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.corpus_folder = corpus_folder or folder / "corpus"
        keep_freed_memory()

    @classmethod
    def open(cls, folder: Path, progress: Progress, recipe: Recipe | None = None) -> "Run":
        """A run directory with a recipe to (re)write, or an existing one to continue."""
        if recipe is None:
            from puzzle import config

            if not (folder / "run.yaml").exists():
                raise UserError(
                    f"run {folder}: no run.yaml there; expected the directory of a `puzzle run`"
                )
            recipe = config.parse(config.read_yaml(folder / "run.yaml"), str(folder / "run.yaml"))
        return cls(recipe, folder, progress)

    def write_recipe(self) -> None:
        text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False)
        artifacts.write_text(self.folder / "run.yaml", text)

    def stage_folder(self, stage: str) -> Path:
        return self.folder / {"assemble": "child", "uptrain": "uptrained"}.get(stage, stage)

    def fingerprint_of(self, stage: str) -> str:
        """The fingerprint of a stage done for the settings of now; otherwise a `UserError` names
        the command.
        """
        found = artifacts.manifest(self.stage_folder(stage))
        if found is None or not artifacts.is_done(self.stage_folder(stage), self.inputs_of(stage)):
            state = "not done" if found is None else "out of date"
            raise UserError(
                f"run {self.folder}: stage {stage} is {state}; run `puzzle {stage} {self.folder}` first"
            )
        return found["fingerprint"]

    def inputs_of(self, stage: str) -> dict[str, Any]:
        """Everything that decides the result of a stage, the fingerprints of the stages before it
        among it.
        """
        return import_module(f"puzzle.{stage}.stage").inputs(self)

    # -------------------------------------------------------------------------------------- machine

    @cached_property
    def device(self) -> torch.device:
        name = self.recipe.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"device {name!r}: {str(error).splitlines()[0]}; use device=auto or device=cpu"
            ) from None
        return device

    @cached_property
    def bfloat16(self) -> bool:
        """Whether matrix products run in bfloat16 (autocast over float32 weights)."""
        if self.recipe.precision != "auto":
            return self.recipe.precision == "bfloat16"
        if self.device.type == "cpu":
            capabilities = torch.cpu.get_capabilities()
            return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        return self.device.type == "cuda"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    @property
    def attention(self) -> str:
        return self.attention_for(self.recipe.corpus.sequence_length)

    def attention_for(self, length: int) -> str:
        return "eager" if self.device.type == "cpu" and length <= EAGER_UP_TO_TOKENS else "sdpa"

    # --------------------------------------------------------------------------------------- inputs

    @cached_property
    def parent(self) -> parent.Parent:
        return parent.describe(self.recipe.parent, self.recipe.trust_remote_code)

    @cached_property
    def parent_model(self) -> PuzzleForCausalLM:
        """The frozen parent: the checkpoint's dtype on GPUs under autocast, float32 elsewhere."""
        return self.parent.load(*self.placement)

    @property
    def placement(self) -> tuple[torch.dtype, torch.device, str]:
        """How a frozen parent is loaded: dtype, device, attention implementation."""
        dtype = self.parent.dtype if self.device.type == "cuda" and self.bfloat16 else torch.float32
        return dtype, self.device, self.attention

    @property
    def memory_bytes(self) -> int:
        """What the device has: a GPU's memory, or this machine's."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def release_models(self) -> None:
        """Give the device's memory back before an engine is started on it."""
        if self.device.type == "cuda":
            self.__dict__.pop("parent_model", None)
            gc.collect()
            torch.cuda.empty_cache()

    @cached_property
    def engine(self) -> ModuleType:
        return engines.load(self.recipe.cost, self.recipe.deploy)

    @cached_property
    def full_space(self) -> spaces.SearchSpace:
        return spaces.build(self.recipe.library, self.parent.shape, self.recipe.deploy)

    @property
    def space(self) -> spaces.SearchSpace:
        """What may be chosen; with `library.coupled`, what the first search has left of it, once
        that is done.
        """
        if self.first is None or artifacts.manifest(self.first.stage_folder("search")) is None:
            return self.full_space
        return self._narrowed

    @cached_property
    def _narrowed(self) -> spaces.SearchSpace:
        assert self.first is not None
        folder = self.first.stage_folder("search")
        found = artifacts.read_json(folder / "solutions.json")["solutions"] + artifacts.read_json(
            folder / "frontier.json"
        )
        names = [solution["blocks"] for solution in found]
        return spaces.narrow(self.full_space, names, self.recipe.library.coupled)

    @cached_property
    def first(self) -> "Run | None":
        """The decoupled run inside a coupled one, in `RUN/first`: its library, scores, costs and
        search.
        """
        if not self.recipe.library.coupled:
            return None
        library = self.recipe.library.model_copy(update={"coupled": 0})
        recipe = self.recipe.model_copy(update={"library": library})
        return Run(recipe, self.folder / "first", self.progress, self.corpus_folder)

    def curve(self, stage: str, step: int, values: dict[str, dict[str, float]]) -> None:
        """A live record for people, in `RUN/logs`: JSON lines, TensorBoard where it is installed,
        W&B where asked.
        """
        artifacts.append_jsonl(self.folder / "logs" / f"{stage}.jsonl", {"step": step, **values})
        if self._tensorboard is not None:
            for name, figures in values.items():
                for kind, value in figures.items():
                    if kind != "tokens":
                        self._tensorboard.add_scalar(f"{stage}/{name}/{kind}", value, step)
        if stage == "uptrain" and self.recipe.uptrain.wandb:
            flat = {
                f"{name}/{kind}": value
                for name, figures in values.items()
                for kind, value in figures.items()
            }
            self._wandb.log(flat, step=step)

    @cached_property
    def _wandb(self) -> Any:
        import wandb  # there: uptrain.check has looked

        mark = artifacts.fingerprint(str(self.folder.resolve()))
        return wandb.init(
            project="puzzle", name=self.folder.name, id=mark, resume="allow", dir=str(self.folder)
        )

    @cached_property
    def _tensorboard(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.folder / "logs" / "tensorboard"))

    @cached_property
    def corpus(self) -> dict[corpus.Split, corpus.Sequences]:
        return corpus.build(
            self.recipe.corpus,
            self.parent.tokenizer,
            self.corpus_folder,
            tokenizer_fingerprint=self.parent.tokenizer_fingerprint,
            progress=self.progress,
        )

    @cached_property
    def data_inputs(self) -> dict[str, Any]:
        """What decides the tokens and the arithmetic of a training or evaluation stage."""
        return {
            "parent": self.parent.fingerprint,
            "tokenizer": self.parent.tokenizer_fingerprint,
            "corpus": self.recipe.corpus.model_dump(mode="json"),
            "sources": corpus.source_marks(self.recipe.corpus),
            "device": self.device.type,
            "bfloat16": self.bfloat16,
        }
