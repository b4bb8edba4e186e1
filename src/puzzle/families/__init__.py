"""Parent families: how a Hugging Face config and its weight names become ours. One module per family.

A family module has three functions: `shape(config) -> ModelShape`, `child_settings(config) -> dict` (the keys of
`PuzzleConfig` besides `block_configs`) and `rename(name) -> name` (a checkpoint's tensor name in Llama's naming).
"""

from importlib import import_module
from types import ModuleType

from puzzle.errors import UserError

FAMILIES = {"llama": "puzzle.families.llama"}  # model_type -> module


def family(model_type: str) -> ModuleType:
    if model_type not in FAMILIES:
        raise UserError(
            f"parent: model type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))} "
            "(docs/architecture.md shows how to add a family)"
        )
    return import_module(FAMILIES[model_type])
