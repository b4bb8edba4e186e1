"""Reads a GGUF file again and compares it with the child it was made from.

Needs memory for one tensor at a time, and for the model where llama_cpp is there to generate with
it.
"""

from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from puzzle.errors import UserError
from puzzle.export import gguf_vocabulary
from puzzle.export.exporter import Comparison
from puzzle.export.gguf_child import read_child
from puzzle.export.gguf_splitting import TEST_TEXT
from puzzle.export.gguf_tensors import Entry, deinterleave, plan
from puzzle.export.gguf_types import FILE_TYPES, gguf_package
from puzzle.model import child
from puzzle.model.modeling_puzzle import PuzzleConfig, PuzzleForCausalLM
from puzzle.model.weights import Weights

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

# Standard deviations of the logits that a choice may lie below the best: llama.cpp rounds
# activations as it stores matrices. At least five times the largest seen on random models
# (docs/log.md), which amplify rounding.
GAPS = {"f32": 0.01, "f16": 0.1, "bf16": 0.2, "q8_0": 0.2}
LONGEST_PROMPT = 64  # tokens


class GGUFComparison(Comparison):
    """The file, the dtype of its matrices and the number of tensors compared.

    Where llama_cpp is installed also the tokens it generated, how many of them are our loader's own
    choice, and how far below that choice the worst of them lies, in standard deviations of the
    logits.
    """

    file: str
    dtype: str
    tensors: int
    generated_tokens: int | None = None
    same_tokens: int | None = None
    largest_gap_in_deviations: float | None = None


def verify(source: Path, target: Path, *, tokens: int = 32) -> GGUFComparison:
    """Read the file in `target` again and compare it with the child in `source`.

    Every tensor must be the checkpoint's up to the rounding of its type. Where llama_cpp is
    installed it must also split a test text as transformers does, and the `tokens` tokens it
    generates greedily must be ones that our own loader, given the file's weights, finds as likely
    as its own choice: within `GAPS` standard deviations of the logits. Raises `UserError` where
    something differs.
    """
    path = _only_file(target)
    reader: GGUFReader = gguf_package().GGUFReader(path)
    config, architecture = read_child(source)
    dtype = _dtype(reader)
    generates = tokens > 0 and find_spec("llama_cpp") is not None
    state: dict[str, torch.Tensor] = {}
    with Weights(source) as weights:
        entries = plan(config, architecture, weights, dtype)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        different = {entry.name for entry in entries} ^ set(stored)
        if different:
            raise UserError(
                f"{path}: its tensors differ from the child's in {min(different)}; export it again"
            )
        for entry in entries:
            values = _values(stored[entry.name], entry)
            _compare(path, entry, values, entry.original(weights))
            if generates:
                state[entry.source] = values
    if not generates:
        return GGUFComparison(file=path.name, dtype=dtype, tensors=len(entries))
    model = child.build(config, state, torch.float32, torch.device("cpu"))
    prompt, generated = _generate(path, source, config, tokens)
    same, gap = _compare_with_best(model, prompt, generated)
    if gap > GAPS[dtype]:
        raise UserError(
            f"{path}: llama.cpp generates tokens that are {gap:.3g} standard deviations below our "
            f"best, expected at most {GAPS[dtype]}; "
            "this llama.cpp computes another model than the child"
        )
    return GGUFComparison(
        file=path.name,
        dtype=dtype,
        tensors=len(entries),
        generated_tokens=tokens,
        same_tokens=same,
        largest_gap_in_deviations=gap,
    )


def _only_file(target: Path) -> Path:
    paths = sorted(target.glob("*.gguf"))
    if len(paths) != 1:
        raise UserError(
            f"export gguf: {target}: got {len(paths)} files *.gguf, expected one; "
            "verify one folder per export"
        )
    return paths[0]


def _dtype(reader: "GGUFReader") -> str:
    """The dtype, a key of `FILE_TYPES`, that the file says it has."""
    file_type = reader.fields["general.file_type"].contents()
    members = gguf_package().LlamaFileType
    (dtype,) = [dtype for dtype, name in FILE_TYPES.items() if members[name] == file_type]
    return dtype


def _values(tensor: "ReaderTensor", entry: Entry) -> torch.Tensor:
    """The values of a tensor of the file, in float32, in the shape and order the checkpoint has."""
    array = gguf_package().quants.dequantize(tensor.data, tensor.tensor_type)
    values = torch.from_numpy(array.copy())
    return deinterleave(values, entry.heads) if entry.heads else values


def _compare(path: Path, entry: Entry, values: torch.Tensor, original: torch.Tensor) -> None:
    """Raise `UserError` where `values` are not what `entry.type` makes of `original` (float32)."""
    kind = entry.type.name
    expected, tolerance = original, torch.zeros(())
    if kind in ("F16", "BF16"):
        expected = original.to(torch.float16 if kind == "F16" else torch.bfloat16).float()
    if kind == "Q8_0":  # of a step, half by rounding, the rest by the step's own rounding to f16
        steps = original.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
        tolerance = steps * (0.5 + 127 * 2**-11) + 127 * 2**-25
        tolerance = tolerance.expand(-1, 32).reshape(original.shape)
    if values.shape != expected.shape or bool(((values - expected).abs() > tolerance).any()):
        raise UserError(
            f"{path}: {entry.name} is not the child's {entry.source or 'constant'}; export it again"
        )


def _generate(
    path: Path, source: Path, config: PuzzleConfig, count: int
) -> tuple[list[int], list[int]]:
    """The prompt, and `count` tokens that llama.cpp generates greedily with the file in `path`.

    Raises `UserError` where llama.cpp splits the test text otherwise than transformers.
    """
    import llama_cpp

    ids: list[int] = gguf_vocabulary.load(source, config)(TEST_TEXT).input_ids
    room = min(len(ids), LONGEST_PROMPT, config.max_position_embeddings - count)
    prompt = ids[: max(1, room)]
    engine = llama_cpp.Llama(
        str(path),
        n_ctx=len(prompt) + count,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    llama_cpp_ids = engine.tokenize(TEST_TEXT.encode(), add_bos=True, special=False)
    if llama_cpp_ids != ids:
        raise UserError(
            f"{path}: llama.cpp splits a test text into {llama_cpp_ids}, transformers into {ids}"
        )
    tokens = engine.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
    generated = list(islice(tokens, count))
    engine.close()
    return prompt, generated


@torch.no_grad()
def _compare_with_best(
    model: PuzzleForCausalLM, prompt: list[int], generated: list[int]
) -> tuple[int, float]:
    """How many generated tokens are the model's best, and by how much the worst is below its best.

    In standard deviations of the logits, given the tokens generated before.
    """
    logits_SV = model(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1]
    generated_S = torch.tensor(generated)
    logits_S = logits_SV.gather(1, generated_S[:, None])[:, 0]
    gap = float(((logits_SV.amax(1) - logits_S) / logits_SV.std(1)).max())
    same = int((logits_SV.argmax(1) == generated_S).sum())
    return same, gap
