"""Which blocks need an exact score: those that some search could choose, going by the estimates."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from puzzle.model.architecture import Block, ModelShape, Subblock

KV_SHARES = (0.0, 0.5, 0.9, 0.99, 1.0)  # of what an attention's size is made of
ERROR_OF_FISHER = 0.05  # a block is a candidate unless it loses even when estimates err by this
Point = tuple[float, float]


def scored_blocks(blocks: Sequence[Block], granularity: str) -> list[Block]:
    """All blocks of a layer, or those that change one subblock of the parent's, which is first."""
    if granularity == "block":
        return list(blocks)
    parent = blocks[0]
    return [b for b in blocks if b.attention == parent.attention or b.ffn == parent.ffn]


def candidates(blocks: Sequence[Block], losses: Sequence[float], shape: ModelShape) -> list[Block]:
    """The blocks of a layer that a search could choose if losses are right to `ERROR_OF_FISHER`.

    Whatever a search limits (seconds, bytes, parameters), an attention and an FFN have a price each
    in it, so it minimises loss + prices * sizes for prices of at least 0. The size of an attention
    is that of its parameters, of its KV cache, which also decides decode time, or something between
    (`KV_SHARES`). A block stays if there are prices at which no other is surely better: what the
    half-planes of all the others leave of the quadrant of prices is not empty. (What whole blocks
    leave of a budget can make another block the best by a little; benchmarks/score.py measures
    that.)
    """
    kept = {
        index for share in KV_SHARES for index in _candidates(_sizes(blocks, shape, share), losses)
    }
    return [blocks[index] for index in sorted(kept)]


def _candidates(sizes: NDArray[np.float64], losses: Sequence[float]) -> list[int]:
    """The numbers of the blocks that are candidates for these sizes [blocks, 2]."""
    loss = np.maximum(np.array(losses), 0.0)
    least, most = loss * (1 - ERROR_OF_FISHER), loss * (1 + ERROR_OF_FISHER)
    highest = 1e4 * max(float(loss.max()), 1e-9)
    kept = [0]
    for index in range(1, len(sizes)):
        prices = [(0.0, 0.0), (highest, 0.0), (highest, highest), (0.0, highest)]
        for other in range(len(sizes)):
            room = float(most[other] - least[index])
            prices = _clip(prices, sizes[index] - sizes[other], room)
        if prices:
            kept.append(index)
    return kept


def _clip(polygon: list[Point], normal: NDArray[np.float64], room: float) -> list[Point]:
    """The part of a convex polygon where normal . point <= room."""
    (a, b), clipped = normal.tolist(), []
    over = [a * x + b * y - room for x, y in polygon]
    for index, (x, y) in enumerate(polygon):
        (u, v), before, after = polygon[index - 1], over[index - 1], over[index]
        if before * after < 0:
            share = before / (before - after)
            clipped.append((u + share * (x - u), v + share * (y - v)))
        if after <= 0:
            clipped.append((x, y))
    return clipped


def _sizes(blocks: Sequence[Block], shape: ModelShape, kv_share: float) -> NDArray[np.float64]:
    """[blocks, 2]: of attention and FFN, shares of the parent's widest.

    `kv_share` of an attention's size is its KV cache.
    """
    most = shape.widest_block.attention.kv_heads
    sizes = [[_size(half, shape) for half in block.subblocks] for block in blocks]
    caches = [[block.attention.kv_heads / max(most, 1), 0.0] for block in blocks]
    return np.array(sizes) * [1 - kv_share, 1.0] + np.array(caches) * kv_share


def _size(variant: Subblock, shape: ModelShape) -> float:
    """Parameters as a share of the parent's widest subblock."""
    attention, ffn = shape.widest_block.subblocks
    parent = attention if variant.slot == "attention" else ffn
    return shape.parameters(variant) / shape.parameters(parent)
