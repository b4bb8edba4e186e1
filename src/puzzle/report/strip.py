"""An architecture as a strip of layers: what each has kept of attention and FFN, and of time."""

from collections.abc import Sequence

from puzzle.model.architecture import Architecture, Block, ModelShape, Subblock
from puzzle.report.charts import Mark, mark, svg, text

LAYERS_PER_ROW = 16
COLUMN, HALF, LABEL = 34.0, 46.0, 14.0
ROW = 2 * HALF + 2 * LABEL + 30
TIME = 70.0  # the height of a bar that takes as long as the parent's
LEFT = 62.0


def shares(block: Block, shape: ModelShape) -> tuple[float, float]:
    """What a block has kept of the KV heads and of the FFN width of the parent's largest layer."""
    return (
        block.attention.kv_heads / max(1, shape.num_key_value_heads),
        block.ffn.intermediate_size / max(1, shape.intermediate_size),
    )


def architecture(
    title: str, blocks: Architecture, shape: ModelShape, says: Sequence[str] = ()
) -> str:
    """A column per layer: attention (KV heads) above, FFN (width) below, the parent's in grey.

    Args:
        title: what it shows.
        blocks: the architecture.
        shape: the parent's.
        says: a sentence for each layer.
    """
    parts = []
    for layer, block in enumerate(blocks):
        x, y = _place(layer, ROW)
        middle = y + LABEL + HALF
        of_attention, of_ffn = shares(block, shape)
        inside = _half(x, middle, -1, block.attention, of_attention)
        inside += _half(x, middle, 1, block.ffn, of_ffn)
        inside += text(x + COLUMN / 2, middle + HALF + LABEL + 11, str(layer), "middle", "label")
        sentence = says[layer] if says else f"layer {layer}: {block.name}"
        parts.append(mark(Mark(layer, 0, sentence, {"layer": str(layer)}), inside))
    for row in range(-(-len(blocks) // LAYERS_PER_ROW)):
        middle = row * ROW + LABEL + HALF
        parts.append(text(LEFT - 8, middle - HALF / 2 + 4, "attention", "end", "label"))
        parts.append(text(LEFT - 8, middle + HALF / 2 + 4, "FFN", "end", "label"))
        parts.append(text(LEFT - 8, middle + HALF + LABEL + 11, "layer", "end", "number"))
    return svg(title, *_size(len(blocks), ROW), parts, "strip")


def _place(layer: int, row_height: float) -> tuple[float, float]:
    row, column = divmod(layer, LAYERS_PER_ROW)
    return LEFT + column * COLUMN, row * row_height


def _size(layers: int, row_height: float) -> tuple[float, float]:
    columns = min(layers, LAYERS_PER_ROW)
    return LEFT + COLUMN * columns + 4, row_height * -(-layers // LAYERS_PER_ROW)


def _half(x: float, middle: float, sign: int, variant: Subblock, share: float) -> str:
    """The bar of one subblock: upward (sign -1) or downward."""
    width = COLUMN - 5
    kind = "kept" if share >= 1 else variant.slot
    height = HALF * (0.12 if variant.kind == "linear" else min(1.0, share))

    def box(tall: float, name: str) -> str:
        top = middle - tall if sign < 0 else middle
        return (
            f'<rect class="{name}" x="{x:.1f}" y="{top:.1f}" width="{width}" height="{tall:.1f}"/>'
        )

    label = str(variant.size) if variant.size else {"no_op": "none"}.get(variant.kind, variant.kind)
    at = middle + (-HALF - 4 if sign < 0 else HALF + 11)
    written = text(x + width / 2, at, label, "middle", "number" if share >= 1 else "label")
    return box(HALF, "frame") + (box(height, kind) if height else "") + written


def times(
    title: str, child: Sequence[tuple[float, float]], says: Sequence[str], unit: float
) -> str:
    """A column per layer: its seconds, attention below FFN, in the frame of the parent's layer.

    Args:
        title: what it shows.
        child: seconds of attention and FFN, layer by layer.
        says: a sentence for each layer.
        unit: seconds of the parent's slowest layer.
    """
    parts, row_height = [], TIME + 34
    for layer, seconds in enumerate(child):
        x, y = _place(layer, row_height)
        base, width = y + TIME + 4, COLUMN - 5
        inside = f'<rect class="frame" x="{x}" y="{base - TIME}" width="{width}" height="{TIME}"/>'
        top = base
        for kind, value in zip(("attention", "ffn"), seconds, strict=True):
            tall = max(0.0, value / unit) * TIME
            top -= tall
            inside += (
                f'<rect class="{kind}" x="{x}" y="{top:.1f}" width="{width}" height="{tall:.1f}"/>'
            )
        share = max(0.0, sum(seconds) / unit)
        inside += text(x + width / 2, base + 12, f"{share:.0%}", "middle")
        parts.append(mark(Mark(layer, 0, says[layer], {"layer": str(layer)}), inside))
    return svg(title, *_size(len(child), row_height), parts, "strip")


STYLE = """
.strip .frame{fill:none;stroke:var(--line)} .strip .kept{fill:var(--parent);opacity:.55}
.strip .attention{fill:var(--attention)} .strip .ffn{fill:var(--ffn)} .strip text{font-size:10.5px}
"""
