"""First weights by least squares against the paper's, by calibration tokens for each channel.

    python benchmarks/least_squares.py [--quick] [--json]

Normalised MSE of a variant's first weights, on text that calibrated nothing, for some layers of the
embedded parent: the paper's initialisation (pruned weights, products of matrices), least squares
with a ridge of 1e-3 towards them, and ours, whose ridge is chosen by cross-validation and which
keeps the paper's weights where nothing is gained. `worst` is ours over the paper's in the worst
layer: above 1.00 least squares have lost.
"""

import statistics
from unittest import mock

import common
import torch

from puzzle.data import sources
from puzzle.library import initialization
from puzzle.model import parent, variants
from puzzle.model.architecture import FFN, Attention, Subblock
from puzzle.model.layers import ParentLayers
from puzzle.model.modeling_puzzle import LayerContext, PuzzleDecoderLayer
from puzzle.model.parent import Parent
from puzzle.model.variants import State

RATIOS = (0.3, 0.67, 1.0, 3.0, 10.0, 30.0)
LENGTH, TEST_SEQUENCES = 256, 32
Inputs = tuple[torch.Tensor, LayerContext]  # of a layer, [B, S, D]
Made = tuple[Parent, PuzzleDecoderLayer, Subblock]  # what is made: a variant of a parent's layer


def fixed(gram_FNN: torch.Tensor, cross_FNM: torch.Tensor, near_MN: torch.Tensor) -> torch.Tensor:
    """Least squares with one ridge for all: 1e-3 of the mean of the diagonal."""
    gram, near = gram_FNN.double().sum(0), near_MN.double()
    left_NM = cross_FNM.double().sum(0) - gram @ near.T
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    return (near + torch.linalg.solve(gram, left_NM).T).float()


def text(described: Parent, sequences: int) -> torch.Tensor:
    """[sequences, LENGTH] tokens of the standard library, every file's tokens one after another."""
    tokens: list[int] = []
    for _, path in sources.stdlib_files()[::7]:
        tokens += described.tokenizer(path.read_text(encoding="utf-8", errors="ignore")).input_ids
        if len(tokens) >= sequences * LENGTH:
            break
    return torch.tensor(tokens[: sequences * LENGTH]).view(sequences, LENGTH)


@torch.no_grad()
def error(made: Made, first: State, test: Inputs) -> float:
    """Normalised MSE of a variant's half of the layer on test inputs."""
    described, layer, variant = made
    module = variants.block_module(described, 0, variant.alone, "sdpa")
    module.load_state_dict(first)
    x_BSD, context = test
    if variant.slot == "attention":
        outputs = [m.eval().attention(x_BSD, **context) for m in (module, layer)]
    else:
        h_BSD = layer.attention(x_BSD, **context)
        outputs = [m.eval().feed_forward(h_BSD) for m in (module, layer)]
    difference = (outputs[0] - outputs[1]).square().sum()
    return float(difference / outputs[1].square().sum())


@torch.no_grad()
def main() -> None:
    """Print a row for every variant and ratio."""
    args = common.start(common.parser(__doc__, quick="one layer, two ratios"))
    described = parent.describe("pocket")
    layers = ParentLayers(described.load(torch.float32, torch.device("cpu")))
    width, hidden = described.shape.intermediate_size, described.shape.hidden_size
    kinds = [FFN("gated", width // 2), FFN("gated", width // 4), FFN("linear"), Attention("linear")]
    chosen = [2] if args.quick else [1, 5, 9]
    ratios = (0.67, 3.0) if args.quick else RATIOS
    most = int(max(ratios) * width) // LENGTH + 1
    tokens_BS = text(described, TEST_SEQUENCES + most)
    states_BSD, _ = layers.embed(tokens_BS)
    contexts = {n: layers.embed(tokens_BS[:1, :n])[1] for n in range(1, LENGTH + 1)}
    common.print_header("variant", "tokens/channel", "paper", "ridge 1e-3", "ours", "worst")
    errors: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    for index in range(max(chosen) + 1):
        with layers.layer(index) as layer:
            if index in chosen:
                test = states_BSD[:TEST_SEQUENCES], contexts[LENGTH]
                for kind in kinds:
                    channels = kind.intermediate_size if kind.kind == "gated" else hidden
                    for ratio in ratios:
                        tokens = max(2, round(ratio * channels))
                        rows = states_BSD[TEST_SEQUENCES:][: -(-tokens // LENGTH)]
                        length = -(-tokens // len(rows))
                        seen = rows[:, :length]
                        row = _errors((described, layer, kind), (seen, contexts[length]), test)
                        errors.setdefault((kind.name + f" {kind.slot}", ratio), []).append(row)
            batches = states_BSD.split(16)
            states_BSD = torch.cat([layer(x_BSD, **contexts[LENGTH]) for x_BSD in batches])
    rows = []
    for (name, ratio), found in errors.items():
        means = [statistics.mean(row[i] for row in found) for i in range(3)]
        worst = max(ours / paper for paper, _, ours in found)
        common.print_row(name, ratio, *(f"{value:.5f}" for value in means), f"{worst:.3f}")
        rows.append(
            {"variant": name, "ratio": ratio, "paper": means[0], "ridge": means[1]}
            | {"ours": means[2], "worst": worst}
        )
    common.print_json(args, rows)


def _errors(made: Made, seen: Inputs, test: Inputs) -> tuple[float, float, float]:
    """Of the paper's weights, one ridge for all, and ours."""
    (described, layer, variant), (x_BSD, context), found = made, seen, []
    for least_squares, solve in ((False, None), (True, fixed), (True, initialization.solve)):
        calibration = initialization.calibrate(layer, [x_BSD], context, least_squares)
        with mock.patch.object(initialization, "solve", solve or initialization.solve):
            first = initialization.initial_state(
                layer.state_dict(), variant, described.shape, calibration
            )
        found.append(error(made, first, test))
    return found[0], found[1], found[2]


if __name__ == "__main__":
    main()
