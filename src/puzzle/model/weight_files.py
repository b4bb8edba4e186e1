"""Which files of a checkpoint hold its weights, what their headers say, what is not taken.

A folder may hold more than one set of weights (Mistral's `consolidated.safetensors`, pickles of
older days, adapters). As in transformers and vLLM, `model.safetensors.index.json` says which files
count, and without it that is `model.safetensors`. The rest is never opened. No tensor is read here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue
from safetensors import safe_open

from puzzle import artifacts
from puzzle.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of weights that we take
# Names that quantisers give to tensors beside a weight, or instead of it.
QUANTISED_NAMES = (
    "qweight",
    "qzeros",
    "scales",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "absmax",
    "quant_map",
    "SCB",
)
QUANTISERS = {  # `quant_method` of a config, as people call it
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4",
}
CONFIG_KEYS = ("quantization_config", "compression_config")
CONFIG_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}  # of older quantisers
# What a folder without weights that we read may hold, and how to get from there to some.
OTHERS = (
    (
        "model-*-of-*.safetensors",
        f"shards without their index; download {INDEX} as well",
    ),
    (
        "adapter_model.*",
        "an adapter; merge it into its base model first (peft: merge_and_unload)",
    ),
    (
        "consolidated*.safetensors",
        f"weights under Mistral's own names only; download model*.safetensors and {INDEX} as well",
    ),
    (
        "*.safetensors",
        f"neither {SINGLE} nor {INDEX}; rename the file if it holds the whole model",
    ),
    ("*.gguf", "GGUF weights, which are quantised or renamed; give the checkpoint they come from"),
    (
        "*.index.json",
        "an index of weights that are not safetensors; convert the weights to safetensors first",
    ),
    *(
        (
            pattern,
            "pickled weights, which are never read as they can run code; convert the weights to "
            "safetensors first",
        )
        for pattern in ("*.bin", "*.pt", "*.pth")
    ),
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it."""

    path: Path
    dtype: str  # as safetensors names it: BF16
    shape: tuple[int, ...]


def open_file(path: Path) -> safe_open:
    """A safetensors file, memory-mapped. Raises `UserError` for a damaged one."""
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises several kinds
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint, sorted. Raises `UserError` for none."""
    index = read_index(folder)
    if index is not None:
        return sorted({folder / file for file in index.values()})
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    for pattern, instead in OTHERS:
        for path in sorted(folder.glob(pattern)):
            raise UserError(
                f"parent {folder}: no {SINGLE} and no {INDEX} there; {path.name}: {instead}"
            )
    raise UserError(
        f"parent {folder}: no {SINGLE} and no {INDEX} there; expected the weights of the model"
    )


def stored_bytes(folder: Path) -> int:
    """What the weights of a checkpoint take on disk; 0 where it has none."""
    try:
        return sum(path.stat().st_size for path in weight_files(folder))
    except UserError:
        return 0


def read_index(folder: Path) -> dict[str, str] | None:
    """The file of every tensor, by the checkpoint's index; None where it has none.

    Raises `UserError` for an index that is damaged, that names files outside of its folder, or
    files that are not there.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    weight_map = artifacts.read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: no weight_map; expected a file's name for every tensor")
    files: dict[str, str] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise UserError(
                f"{path}: {name!r} is in {file!r:.80}; expected the name of a safetensors file "
                "beside the index"
            )
        files[name] = file
    for file in sorted(set(files.values())):
        if not (folder / file).is_file():
            raise UserError(f"{path}: {file} is not there; is the download complete?")
    return files


def _is_plain_name(file: str) -> bool:
    """Whether this is the name of a safetensors file, and no path."""
    suffix = ".safetensors"
    return (
        file.endswith(suffix)
        and len(file) > len(suffix)
        and not any(sign in file for sign in ("/", "\\", ":", "\0"))
        and file.isprintable()
    )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """What the headers say of every tensor of a checkpoint. Raises `UserError`."""
    tensors: dict[str, StoredTensor] = {}
    index = read_index(folder)
    for path in weight_files(folder):
        with open_file(path) as file:
            for name in names_in(path, file, index):
                part = file.get_slice(name)
                tensors[name] = StoredTensor(path, part.get_dtype(), tuple(part.get_shape()))
    return tensors


def names_in(path: Path, file: safe_open, index: dict[str, str] | None) -> Iterable[str]:
    """The tensors of one file that count: where there is an index, those that it says are there.

    Raises `UserError` for one that is not.
    """
    names: list[str] = list(file.keys())
    if index is None:
        return names
    listed = [name for name, where in index.items() if where == path.name]
    missing = set(listed).difference(names)
    if missing:
        raise UserError(
            f"{path}: lacks {min(missing)}, which {INDEX} says is in it; download both again"
        )
    return listed


def stored_dtype(folder: Path) -> str:
    """The dtype of most of a checkpoint's weights: `bfloat16`, `float16` or `float32`."""
    elements: dict[str, int] = {}
    for tensor in stored_tensors(folder).values():
        size = 1
        for length in tensor.shape:
            size *= length
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + size
    dtype = max(elements, key=lambda name: elements[name], default="F32")
    return DTYPES.get(dtype, "float32")


# ------------------------------------------------------------------------------------ quantisation


def refuse_quantised(name: str, folder: Path, config: dict[str, JsonValue]) -> None:
    """Raise `UserError` for a checkpoint whose config or files say that it is quantised."""
    for key in CONFIG_KEYS:
        if settings := config.get(key):
            raise _quantised(name, _quantiser(settings))
    for file, quantiser in CONFIG_FILES.items():
        if (folder / file).is_file():
            raise _quantised(name, quantiser)


def refuse_quantised_tensors(name: str, tensors: dict[str, StoredTensor]) -> None:
    """Raise `UserError` for weights that are no floating-point numbers of 16 or 32 bits."""
    for key, tensor in tensors.items():
        if key.rpartition(".")[2] in QUANTISED_NAMES or "." + "quant_state" in key:
            raise _quantised(name, f"it holds {key}")
        if key.endswith(".weight") and tensor.dtype not in DTYPES:
            raise _quantised(name, f"{key} is {tensor.dtype}")


def _quantiser(settings: JsonValue) -> str:
    if not isinstance(settings, dict):
        return "by its quantization_config"
    method = str(settings.get("quant_method") or settings.get("format") or "unknown method")
    bits = settings.get("bits") or settings.get("w_bit")
    label = QUANTISERS.get(method, method[:40])
    return f"{label}, {bits} bits" if isinstance(bits, int) else label


def _quantised(name: str, how: str) -> UserError:
    return UserError(
        f"parent {name}: its weights are quantised ({how}); expected float32, bfloat16 or float16: "
        "give the checkpoint they were made from, and quantise the child"
    )
