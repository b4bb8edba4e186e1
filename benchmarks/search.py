"""The exact search against python-mip (CBC), the reference's solver, on the published block library
of a 70B model.

    pip install mip
    python benchmarks/search.py [--json] [--quick]

python-mip is given the program as appendix B writes it. Same machine, same process, in turn. Twelve
pairs of limits, proven optimum (gap 0); then ten solutions that differ in at least ten layers (gap
1e-4), a frontier of forty points, and random libraries of 160 layers x 200 variants with four
constraints. Needs the published library in shared/data; --quick takes a small random one. Where
python-mip is not installed its columns stay empty.
"""

import importlib.util
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np

from puzzle.search import mip
from puzzle.search.program import Program, starts_of
from puzzle.search.table import Table

DATA = Path(__file__).parents[2] / "shared" / "data" / "llama-3.3-70b-block-library.json"
KL, RUNTIME, MEMORY = "metrics.kl_div", "stats.runtime_ms", "stats.memory_mib"
PAIRS = [  # shares of the parent's runtime and memory
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
PYTHON_MIP_LIMIT_S = 400


@dataclass(frozen=True)
class BlockLibrary:
    """Scores and costs of the variants of every layer, in a row; the parent's block comes first."""

    starts: np.ndarray
    kl: np.ndarray
    runtime: np.ndarray
    memory: np.ndarray

    @classmethod
    def published(cls) -> "BlockLibrary":
        """The library of Llama-3.3-70B."""
        table = Table.read(DATA)
        return cls(table.starts, *(table.column(key) for key in (KL, RUNTIME, MEMORY)))

    @classmethod
    def random(cls, layers: int, variants: int) -> "BlockLibrary":
        """A small one for quick runs: the smaller a variant, the larger its KL."""
        generator = np.random.default_rng(0)
        runtime, memory = generator.random((2, layers, variants))
        runtime[:, 0] = memory[:, 0] = 1.0
        kl = (2 - runtime - memory) * generator.lognormal(0, 0.4, (layers, variants))
        starts = starts_of([variants] * layers)
        return cls(starts, kl.ravel(), runtime.ravel(), memory.ravel())

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.starts) - 1

    def program(self, runtime_share: float, memory_share: float) -> Program:
        """At most these shares of the parent's runtime and memory."""
        parent = self.starts[:-1]
        limits = [
            runtime_share * self.runtime[parent].sum(),
            memory_share * self.memory[parent].sum(),
        ]
        resources = np.vstack([self.runtime, self.memory])
        return Program(self.starts, self.kl, resources, np.array(limits))


# ------------------------------------------------------------------------------------- python-mip


def python_mip_missing() -> bool:
    """Whether the reference's solver cannot be imported; says so."""
    if importlib.util.find_spec("mip") is None:
        print(
            "python-mip is not installed: only ours is measured (pip install mip)", file=sys.stderr
        )
        return True
    return False


def solve_with_python_mip(
    program: Program, gap: float, earlier: list[np.ndarray], overlap: int
) -> tuple[float, float, np.ndarray]:
    """(objective, seconds, columns) of one program.

    At most `overlap` groups may take the column that one of the `earlier` solutions took there.
    """
    import mip as python_mip

    began = time.perf_counter()
    model = python_mip.Model(sense=python_mip.MINIMIZE, solver_name=python_mip.CBC)
    model.verbose = 0
    model.max_mip_gap, model.max_mip_gap_abs = gap, 1e-9 if gap == 0 else 1e-10
    x = [model.add_var(var_type=python_mip.BINARY) for _ in program.costs]
    total = python_mip.xsum
    model.objective = total(float(c) * v for c, v in zip(program.costs, x, strict=True))
    for first, end in zip(program.starts[:-1], program.starts[1:], strict=True):
        model += total(x[first:end]) == 1
    for row, limit in zip(program.resources, program.limits, strict=True):
        model += total(float(r) * v for r, v in zip(row, x, strict=True)) <= float(limit)
    for columns in earlier:
        model += total(x[column] for column in columns) <= overlap
    model.optimize(max_seconds=PYTHON_MIP_LIMIT_S)
    columns = np.array([i for i, v in enumerate(x) if v.x is not None and v.x > 0.5])
    return float(program.costs[columns].sum()), time.perf_counter() - began, columns


# ----------------------------------------------------------------------------------- measurements


def pairs(
    library: BlockLibrary, limits: list[tuple[float, float]], missing: bool
) -> dict[str, Any]:
    """Both solvers on every pair of limits. `missing`: ours alone."""
    names = ("ours s", "python-mip s", "ratio", "objective ours", "theirs")
    common.print_header("runtime, memory", *names)
    rows: list[dict[str, Any]] = []
    for runtime, memory in limits:
        program = library.program(runtime, memory)
        optimum = mip.solve(program, gap=0.0)
        assert optimum is not None and program.feasible(optimum.columns)
        ours_s, objective = optimum.seconds, optimum.objective
        row = {"limits": [runtime, memory], "ours_s": ours_s, "ours": objective, "gap": optimum.gap}
        cells = [f"{ours_s:.3f}", "", "", f"{objective:.6f}", ""]
        if not missing:
            theirs, theirs_s, _ = solve_with_python_mip(program, 0.0, [], 0)
            row |= {"theirs_s": theirs_s, "theirs": theirs}
            cells[1:3] = f"{theirs_s:.2f}", f"{theirs_s / ours_s:.1f}"
            cells[4] = f"{theirs:.6f}"
        rows.append(row)
        common.print_row(f"{runtime:.0%}, {memory:.0%}", *cells)
    if missing:
        return {"rows": rows}
    mean = math.exp(np.mean([math.log(r["theirs_s"] / r["ours_s"]) for r in rows]))
    worse = sum(r["ours"] > r["theirs"] + 1e-6 for r in rows)
    print(f"geometric mean of the ratios {mean:.1f}x; a worse objective in {worse} of {len(rows)}")
    return {"rows": rows, "geometric_mean_ratio": mean, "worse": worse}


def several(library: BlockLibrary, count: int, differ: int, missing: bool) -> dict[str, Any]:
    """`count` solutions, each of which differs from the others in `differ` layers."""
    program, overlap = library.program(0.5, 0.6), library.layers - differ
    began = time.perf_counter()
    optima = mip.diverse(program, solutions=count, overlap=overlap, gap=1e-4, time_limit_s=300)
    ours_s = time.perf_counter() - began
    ours = [optimum.objective for optimum in optima]
    gap = max(optimum.gap for optimum in optima)
    print(
        f"\n{count} solutions, {differ} layers apart, gap 1e-4: ours {ours_s:.1f} s, "
        f"objectives {ours[0]:.5f} to {ours[-1]:.5f}, largest gap {gap:.1e}",
        flush=True,
    )
    if missing:
        return {"ours_s": ours_s, "ours": ours}
    earlier: list[np.ndarray] = []
    theirs, began = [], time.perf_counter()
    for _ in range(count):
        value, _, columns = solve_with_python_mip(program, 1e-4, earlier, overlap)
        earlier.append(columns)
        theirs.append(value)
    theirs_s = time.perf_counter() - began
    print(
        f"python-mip {theirs_s:.1f} s, objectives {theirs[0]:.5f} to {theirs[-1]:.5f}: "
        f"{theirs_s / ours_s:.1f}x",
        flush=True,
    )
    return {"ours_s": ours_s, "ours": ours, "theirs_s": theirs_s, "theirs": theirs}


def frontier(library: BlockLibrary, points: int) -> dict[str, float]:
    """The best sums of scores from the parent's speed to five times that."""
    parent_s = library.runtime[library.starts[:-1]].sum()
    resources, gaps = library.runtime[None], []
    began = time.perf_counter()
    for speedup in np.linspace(1.0, 5.0, points):
        limit = np.array([parent_s / speedup])
        optimum = mip.solve(Program(library.starts, library.kl, resources, limit), gap=1e-4)
        assert optimum is not None
        gaps.append(optimum.gap)
    seconds = time.perf_counter() - began
    print(
        f"\nfrontier of {points} throughputs, gap 1e-4: {seconds:.1f} s, "
        f"largest gap {max(gaps):.1e}",
        flush=True,
    )
    return {"seconds": seconds, "largest_gap": max(gaps)}


def large(layers: int, variants: int, shared: bool) -> dict[str, Any]:
    """A random library with four constraints.

    `shared`: costs are the same in all layers, as measured ones are, instead of all different.
    """
    generator = np.random.default_rng(0)
    drawn = generator.random((4, 1 if shared else layers, variants))
    resources = np.broadcast_to(drawn, (4, layers, variants))
    quality = 1 - resources.mean(axis=0)  # what takes less costs more quality
    costs = (quality**2 * generator.lognormal(0, 0.4, (layers, variants))).ravel()
    limits = resources.mean(axis=2).sum(axis=1) * 0.7
    starts = starts_of([variants] * layers)
    program = Program(starts, costs, resources.reshape(4, -1), limits)
    optimum = mip.solve(program, gap=1e-4, time_limit_s=60)
    assert optimum is not None and program.feasible(optimum.columns)
    kind = "costs shared by the layers" if shared else "every cost different"
    print(
        f"{layers} layers x {variants} variants, 4 constraints, {kind}: {optimum.seconds:.1f} s, "
        f"gap {optimum.gap:.1e}",
        flush=True,
    )
    return {"shared": shared, "seconds": optimum.seconds, "gap": optimum.gap}


def main() -> None:
    """All four measurements."""
    parser = common.parser(__doc__, quick="a random library of 12 layers x 10 variants")
    args = common.start(parser)
    if not args.quick and not DATA.exists():
        sys.exit(f"{DATA}: no such file, so there is nothing to measure; --quick does without it")
    missing = python_mip_missing()
    library = BlockLibrary.random(12, 10) if args.quick else BlockLibrary.published()
    count, differ, points = (3, 2, 5) if args.quick else (10, 10, 40)
    size = (16, 20) if args.quick else (160, 200)
    figures = {
        "pairs": pairs(library, PAIRS[:3] if args.quick else PAIRS, missing),
        "frontier": frontier(library, points),
        "large": [large(*size, shared) for shared in (True, False)],
        "several": several(library, count, differ, missing),
    }
    common.print_json(args, figures)


if __name__ == "__main__":
    main()
