"""A run: its recipe, its directory, and what every stage needs from both (device, precision, parent, corpus).

Stages take a `Run` and their own folder; everything expensive here is made once, when first asked for.
"""

import contextlib
import gc
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

from puzzle import artifacts, corpus, engines, parent, space
from puzzle.config import Recipe
from puzzle.errors import UserError
from puzzle.modeling_puzzle import PuzzleForCausalLM
from puzzle.progress import Progress

EAGER_UP_TO_TOKENS = 256  # on CPUs plain matrix products beat the fused kernel up to here (benchmarks/attention.py)


class Run:
    def __init__(self, recipe: Recipe, folder: Path, progress: Progress) -> None:
        self.recipe, self.folder, self.progress = recipe, folder, progress

    @classmethod
    def open(cls, folder: Path, progress: Progress, recipe: Recipe | None = None) -> "Run":
        """A run directory with a recipe to (re)write, or an existing one to continue."""
        if recipe is None:
            from puzzle import config

            if not (folder / "run.yaml").exists():
                raise UserError(f"run {folder}: no run.yaml there; expected the directory of a `puzzle run`")
            recipe = config.parse(config.read_yaml(folder / "run.yaml"), str(folder / "run.yaml"))
        return cls(recipe, folder, progress)

    def write_recipe(self) -> None:
        text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False)
        artifacts.write_text(self.folder / "run.yaml", text)

    def stage_folder(self, stage: str) -> Path:
        return self.folder / {"assemble": "child", "uptrain": "uptrained"}.get(stage, stage)

    def fingerprint_of(self, stage: str) -> str:
        """The fingerprint of a stage done for the settings of now; otherwise a `UserError` names the command."""
        found = artifacts.manifest(self.stage_folder(stage))
        if found is None or not artifacts.is_done(self.stage_folder(stage), self.inputs_of(stage)):
            state = "not done" if found is None else "out of date"
            raise UserError(f"run {self.folder}: stage {stage} is {state}; run `puzzle {stage} {self.folder}` first")
        return found["fingerprint"]

    def inputs_of(self, stage: str) -> dict[str, Any]:
        """Everything that decides the result of a stage, the fingerprints of the stages before it among it."""
        return import_module(f"puzzle.{stage}").inputs(self)

    # ------------------------------------------------------------------------------------------ machine

    @cached_property
    def device(self) -> torch.device:
        name = self.recipe.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {name!r}: {str(error).splitlines()[0]}; use device=auto or device=cpu") from None
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
        short = self.recipe.corpus.sequence_length <= EAGER_UP_TO_TOKENS
        return "eager" if self.device.type == "cpu" and short else "sdpa"

    # ------------------------------------------------------------------------------------------ inputs

    @cached_property
    def parent(self) -> parent.Parent:
        return parent.describe(self.recipe.parent, self.recipe.trust_remote_code)

    @cached_property
    def parent_model(self) -> PuzzleForCausalLM:
        """The frozen parent: the checkpoint's dtype on GPUs under autocast, float32 elsewhere."""
        dtype = self.parent.dtype if self.device.type == "cuda" and self.bfloat16 else torch.float32
        return self.parent.load(dtype, self.device, self.attention)

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
    def space(self) -> space.SearchSpace:
        return space.build(self.recipe.library, self.parent.shape, self.recipe.deploy)

    @cached_property
    def corpus(self) -> dict[corpus.Split, corpus.Sequences]:
        return corpus.build(
            self.recipe.corpus,
            self.parent.tokenizer,
            self.folder / "corpus",
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
