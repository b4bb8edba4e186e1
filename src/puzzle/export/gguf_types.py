"""The gguf package, an optional dependency, and its names for dtypes.

Nothing else imports the package when it runs; annotations take their types from it.
"""

from types import ModuleType
from typing import TYPE_CHECKING

from puzzle.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}  # dtype of the matrices -> member of gguf.LlamaFileType


def gguf_package() -> ModuleType:
    """The package `gguf`. Raises `UserError` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "export gguf: the package gguf is not installed; pip install 'puzzle-nas[gguf]'"
        ) from None
    package: ModuleType = gguf
    return package


def tensor_type(shape: tuple[int, ...], dtype: str) -> "GGMLQuantizationType":
    """How a tensor is stored in a file of `dtype` (a key of `FILE_TYPES`).

    Vectors stay float32. q8_0 stores rows in blocks of 32 values: a matrix whose rows are no
    multiple of 32 becomes f16.
    """
    types: type[GGMLQuantizationType] = gguf_package().GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    if dtype == "q8_0" and shape[-1] % 32:
        return types.F16
    return types[dtype.upper()]
