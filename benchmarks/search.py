"""The exact search against python-mip (CBC), the reference's solver, on the published block library
of a 70B model.

    pip install mip
    python benchmarks/search.py [--json] [--quick]

python-mip is given the program as appendix B writes it. Same machine, same process, in turn. Twelve
pairs of limits, proven optimum (gap 0); then ten solutions that differ in at least ten layers (gap
1e-4), a frontier of forty points, and random libraries of 160 layers x 200 variants with four
constraints. Skips with a message without the data.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from puzzle.engines import machine
from puzzle.search import mip as ours
from puzzle.search import published as table

DATA = Path(__file__).parents[2] / "shared" / "data" / "llama-3.3-70b-block-library.json"
PAIRS = [
    (0.5, 0.55),
    (0.5, 0.6),
    (0.4, 0.5),
    (0.6, 0.6),
    (0.7, 0.5),
    (0.3, 0.3),
    (0.8, 0.8),
    (0.45, 0.65),
    (0.65, 0.45),
    (0.25, 0.25),
    (0.55, 0.5),
    (0.9, 0.4),
]
REFERENCE_LIMIT_S = 400


def theirs(
    program: ours.Program, gap: float, avoid: list[np.ndarray], overlap: int, limit_s: float
) -> tuple[float, float, np.ndarray]:
    """(objective, seconds, chosen) of python-mip on one program."""
    import mip

    began = time.perf_counter()
    model = mip.Model(sense=mip.MINIMIZE, solver_name=mip.CBC)
    model.verbose = 0
    model.max_mip_gap, model.max_mip_gap_abs = gap, 1e-9 if gap == 0 else 1e-10
    x = [model.add_var(var_type=mip.BINARY) for _ in program.costs]
    model.objective = mip.xsum(float(c) * v for c, v in zip(program.costs, x, strict=True))
    for a, b in zip(program.starts[:-1], program.starts[1:], strict=True):
        model += mip.xsum(x[a:b]) == 1
    for row, limit in zip(program.resources, program.limits, strict=True):
        model += mip.xsum(float(r) * v for r, v in zip(row, x, strict=True)) <= float(limit)
    for earlier in avoid:
        model += mip.xsum(x[i] for i in earlier) <= overlap
    model.optimize(max_seconds=limit_s)
    chosen = np.array([i for i, v in enumerate(x) if v.x is not None and v.x > 0.5])
    return float(program.costs[chosen].sum()), time.perf_counter() - began, chosen


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    found = table.read(DATA)
    starts = ours.starts_of([len(names) for names in found.names])
    return starts, *(
        found.column(key) for key in ("metrics.kl_div", "stats.runtime_ms", "stats.memory_mib")
    )


def pairs(
    starts: np.ndarray, kl: np.ndarray, runtime: np.ndarray, memory: np.ndarray, quick: bool
) -> dict[str, Any]:
    parents = starts[:-1]  # the parent's block comes first in every layer
    rows = []
    print(
        "| runtime, memory | ours s | python-mip s | ratio | objective ours | theirs |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for a, b in PAIRS[:3] if quick else PAIRS:
        limits = np.array([a * runtime[parents].sum(), b * memory[parents].sum()])
        program = ours.Program(starts, kl, np.vstack([runtime, memory]), limits)
        one = ours.solve(program, gap=0.0)
        assert one is not None and program.feasible(one.chosen)
        value, seconds, _ = theirs(program, 0.0, [], 0, REFERENCE_LIMIT_S)
        rows.append(
            {
                "limits": [a, b],
                "ours_s": one.seconds,
                "theirs_s": seconds,
                "ours": one.objective,
                "theirs": value,
                "gap": one.gap,
            }
        )
        print(
            f"| {a:.0%}, {b:.0%} | {one.seconds:.3f} | {seconds:.2f} | {seconds / one.seconds:.1f} | "
            f"{one.objective:.6f} | {value:.6f} |",
            flush=True,
        )
    mean = math.exp(np.mean([math.log(r["theirs_s"] / r["ours_s"]) for r in rows]))
    worse = sum(r["ours"] > r["theirs"] + 1e-6 for r in rows)
    print(f"geometric mean of the ratios {mean:.1f}x; a worse objective in {worse} of {len(rows)}")
    return {"rows": rows, "geometric_mean_ratio": mean, "worse": worse}


def ten(
    starts: np.ndarray, kl: np.ndarray, runtime: np.ndarray, memory: np.ndarray, reference: bool
) -> dict[str, Any]:
    parents = starts[:-1]
    limits = np.array([0.5 * runtime[parents].sum(), 0.6 * memory[parents].sum()])
    program = ours.Program(starts, kl, np.vstack([runtime, memory]), limits)
    overlap = len(parents) - 10
    began = time.perf_counter()
    found = ours.diverse(program, solutions=10, overlap=overlap, gap=1e-4, time_limit_s=300)
    seconds = time.perf_counter() - began
    print(
        f"\nten solutions, 10 layers apart, gap 1e-4: ours {seconds:.1f} s, objectives {found[0].objective:.5f} to "
        f"{found[-1].objective:.5f}, largest gap {max(f.gap for f in found):.1e}",
        flush=True,
    )
    result: dict[str, Any] = {"ours_s": seconds, "ours": [f.objective for f in found]}
    if reference:
        avoid: list[np.ndarray] = []
        values, began = [], time.perf_counter()
        for _ in range(10):
            value, _, chosen = theirs(program, 1e-4, avoid, overlap, REFERENCE_LIMIT_S)
            avoid.append(chosen)
            values.append(value)
        took = time.perf_counter() - began
        result |= {"theirs_s": took, "theirs": values}
        print(
            f"python-mip {took:.1f} s, objectives {values[0]:.5f} to {values[-1]:.5f}: {took / seconds:.1f}x",
            flush=True,
        )
    return result


def frontier(starts: np.ndarray, kl: np.ndarray, runtime: np.ndarray) -> dict[str, Any]:
    most = runtime[starts[:-1]].sum()
    began = time.perf_counter()
    gaps = []
    for speedup in np.linspace(1.0, 5.0, 40):
        found = ours.solve(ours.Program(starts, kl, runtime[None], np.array([most / speedup])))
        assert found is not None
        gaps.append(found.gap)
    seconds = time.perf_counter() - began
    print(
        f"\nfrontier of 40 throughputs, gap 1e-4: {seconds:.1f} s, largest gap {max(gaps):.1e}",
        flush=True,
    )
    return {"seconds": seconds, "largest_gap": max(gaps)}


def scale(layers: int, variants: int, shared: bool, seed: int) -> dict[str, Any]:
    """A random library with four constraints; costs shared by all layers, as measured ones are, or
    all different.
    """
    generator = np.random.default_rng(seed)
    size = 1 if shared else layers
    resources = generator.random((4, size, variants))
    resources = np.broadcast_to(resources, (4, layers, variants)).reshape(4, -1)
    quality = 1 - resources.reshape(4, layers, variants).mean(
        axis=0
    )  # what takes less costs more quality
    costs = (quality**2 * generator.lognormal(0, 0.4, (layers, variants))).ravel()
    limits = resources.reshape(4, layers, variants).mean(axis=2).sum(axis=1) * 0.7
    program = ours.Program(ours.starts_of([variants] * layers), costs, resources, limits)
    found = ours.solve(program, gap=1e-4, time_limit_s=60)
    assert found is not None and program.feasible(found.chosen)
    kind = "costs shared by the layers" if shared else "every cost different"
    print(
        f"{layers} layers x {variants} variants, 4 constraints, {kind}: {found.seconds:.1f} s, gap {found.gap:.1e}",
        flush=True,
    )
    return {"shared": shared, "seconds": found.seconds, "gap": found.gap}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help="three pairs, no reference for the ten solutions"
    )
    args = parser.parse_args()
    if not DATA.exists():
        sys.exit(f"{DATA} is not here: nothing to measure")
    print(f"{machine()['device']}\n")
    data = load()
    found = {
        "pairs": pairs(*data, args.quick),
        "frontier": frontier(*data[:3]),
        "scale": [scale(160, 200, shared, 0) for shared in (True, False)],
        "ten": ten(*data, reference=not args.quick),
    }
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
