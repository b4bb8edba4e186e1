"""Do the tests notice a change of the code? Mutants of the core modules, each against its tests.

    python benchmarks/mutants.py [--named] [--sample N] [--module M] [--json] [--quick]

A mutant is a copy of the package with one small change: a comparison, an operator, a constant, a
negated condition, a returned None. It is killed where a test fails, or where the time of a test run
is used up. `--named` runs the changes that a review found unnoticed (`NAMED`). Which mutants are
drawn depends on the seed only. What has been run is in `runs/mutants.jsonl` and is not run again
while the module and its tests stay as they are. Each CPU core runs the tests of one mutant. Nothing
is written into the tree.
"""

import ast
import dataclasses
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
from pydantic import JsonValue

from puzzle import artifacts

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, RECORDS = ROOT / "src" / "puzzle", ROOT / "runs" / "mutants.jsonl"
TIME_IS_UP = "the time is up"
# Arguments that change no result
KEYWORDS = ("fused", "non_blocking", "pin_memory", "return_attention_mask", "strict", "verbose")
MOST_S = 120.0  # of a mutant's tests, four times the longest: an endless loop is noticed, too
TESTS = {
    "training/losses.py": ["tests/training/test_losses.py"],
    "library/bld.py": ["tests/library/test_library.py"],
    "score/exact.py": ["tests/score/test_score.py"],
    "score/fisher.py": ["tests/score/test_score.py"],
    "score/results.py": ["tests/score/test_score.py"],
    "score/candidates.py": ["tests/score/test_score.py"],
    "search/program.py": ["tests/search/test_mip.py"],
    "search/mip.py": ["tests/search/test_mip.py"],
    "search/constraints.py": ["tests/search/test_constraints.py", "tests/search/test_search.py"],
    "cost/regression.py": ["tests/cost/test_cost.py"],
    "data/corpus.py": ["tests/data/test_corpus.py", "tests/data/test_splits.py"],
    "data/packing.py": [
        "tests/data/test_chats.py",
        "tests/data/test_corpus.py",
        "tests/data/test_splits.py",
    ],
}
# Lines of which a change changes no result, only how soon it is reached: they are left out. So are
# constants that were found by measuring (docs/log.md), and what matters on a GPU alone.
EXPLAINED = {
    "data/corpus.py": [
        "SHARD_TOKENS = 1 << 26  # 256 MiB of int32: small enough to redo after an interruption",
    ],
    "training/losses.py": [
        'return head_VD if device == "cuda" and head_VD.dtype.itemsize == 2 else head_VD.float()',
    ],
    "search/program.py": [  # equality, to rounding
        "return all(taken[r.columns] @ r.values <= r.limit + TOLERANCE for r in self.extra)",
    ],
    "cost/regression.py": [
        "ORDER, LEAST_FOR_ORDER = 2, 40  # of the autoregression of errors; samples that it needs",
        "ROUNDS = 6  # of fitting and discarding outliers",
        "first_mean = float(np.median(y) / np.abs(counts).sum(axis=1).max())",
    ],
    "score/candidates.py": [
        "KV_SHARES = (0.0, 0.5, 0.9, 0.99, 1.0)  # of what an attention's size is made of",
        "highest = 1e4 * max(float(loss.max()), 1e-9)",  # beyond what any budget asks for
    ],
    "search/mip.py": [  # how a core grows until the optimum is proven, how HiGHS solves a program
        "CORE_PER_GROUP, CORE_SPARE = 2, 30",
        "width = np.sort(reduced_C)[core_size - 1]",
        "solution = core.solve(gap, max(time_left_s, 0.1))",
        "if proven or time.perf_counter() - began > time_limit_s:",
        # any multipliers that are not negative prove a bound; these prove the highest one
        "multipliers = np.maximum(0.0, -answer.row_duals[group_count:])",
        # in which unit a violation is counted
        "excess[group_count : group_count + len(scaled.limits)] = -1.0",
        "model = Model(np.append(np.zeros(column_count), 1.0), np.hstack([rows, excess]))",
        'answer = model.run({"mip_rel_gap": 1e-3, "time_limit": time_limit_s, "random_seed": 0})',
        "narrow = len(columns) < len(reduced_C) / 2",
        "width = max(3 * width, TOLERANCE) if narrow else reduced_C.max()",
        "extra_C = np.minimum(extra_C, 2 * size)",
    ],
}
# Changes that no test noticed once: file, what is replaced, by what, the tests that must notice
NAMED: dict[str, tuple[str, str, str, list[str]]] = {
    "evaluate on train text": (
        "evaluate/stage.py",
        'Text.of(run, "test"',
        'Text.of(run, "train"',
        ["tests/data/test_splits.py"],
    ),
    "the parent is no input": (
        "run.py",
        '            "parent": self.parent.fingerprint,\n',
        "",
        ["tests/test_stale.py::test_other_weights_tokenizer_or_text_are_other_inputs"],
    ),
    "the text is no input": (
        "run.py",
        '            "sources": dict(sources.source_fingerprints(self.corpus_settings)),\n',
        "",
        ["tests/test_stale.py::test_other_weights_tokenizer_or_text_are_other_inputs"],
    ),
    "engine and machine are no inputs of costs": (
        "cost/stage.py",
        '{"header": header(job).as_json(), ',
        "{",
        ["tests/test_stale.py::test_costs_depend_on_engine_version_and_machine"],
    ),
    "no proof of what lies outside the core": (
        "search/mip.py",
        "proven = complete or ",
        "proven = True or ",
        [
            "tests/search/test_mip.py::test_a_core_that_starts_too_small_grows_until_the_optimum_is_proven"
        ],
    ),
    "no scaling to the parent's batches": (
        "cost/measure.py",
        "        fit = fit.scaled(*scales)\n",
        "",
        ["tests/cost/test_cost.py"],
    ),
    "regression on absolute errors": (
        "cost/regression.py",
        "x = x / y[:, None]",
        "x, y = x / y.mean(), y / y.mean()",
        ["tests/cost/test_cost.py"],
    ),
    "settling steps count": (
        "engines/turns.py",
        "steps_s[SETTLING_STEPS:] or steps_s[-1:]",
        "steps_s",
        ["tests/engines/test_turns.py", "tests/cost/test_cost.py"],
    ),
    "warm-up batches count": (
        "cost/measure.py",
        "if number < WARM_UPS:",
        "if number < 0:",
        ["tests/cost/test_cost.py::test_the_first_batches_warm_up_and_do_not_count"],
    ),
    "only the first start counts": (
        "engines/intervals.py",
        "estimate = _seconds(phases, range(count))",
        "estimate = _seconds(phases, [0])",
        ["tests/engines/test_turns.py::test_every_start_of_the_engines_counts"],
    ),
    "memory without the KV cache": (
        "cost/table.py",
        "self.parameter_bytes + self.kv_cache_bytes + self",
        "self.parameter_bytes + self",
        ["tests/cost/test_cost.py::test_memory_is_parameters_cache_and_workspace"],
    ),
    "the task's mask one token late": (
        "data/tasks.py",
        "(len(context) - 1, len(context) + len(choice) - 1)",
        "(len(context), len(context) + len(choice))",
        ["tests/score/test_score.py::test_task_accuracy_is_that_of_a_really_swapped_model"],
    ),
    "uptraining reads BLD's data again": (
        "uptrain/phases.py",
        "self.offset = 0 if settings.seed else -(-recipe.library.tokens // self.tokens)",
        "self.offset = 0",
        ["tests/uptrain/test_phases.py::test_fresh_text_comes_first_what_bld_has_read_comes_last"],
    ),
    "the best KL is forgotten": (
        "uptrain/trainer.py",
        "self.best_kl = math.inf if notes.best_kl is None else notes.best_kl",
        "self.best_kl = math.inf",
        ["tests/uptrain/test_trainer.py::test_what_a_trainer_has_counted_survives_an_interruption"],
    ),
    "no smaller rate for small losses": (
        "library/bld.py",
        "return min(1.0, math.sqrt(self.history[0].validation / FULL_RATE_NMSE))",
        "return 1.0",
        [
            "tests/library/test_library.py::test_the_learning_rate_falls_with_the_root_of_a_small_first_loss"
        ],
    ),
    "calibration on validation text": (
        "library/training.py",
        'run.corpus["train"].batch(0, settings.cal',
        'run.corpus["validation"].batch(0, settings.cal',
        ["tests/data/test_splits.py"],
    ),
    "a sweep compares with the parent at the first batch": (
        "search/stage.py",
        "return max((tables[name] for name in swept), "
        "key=lambda t: t.tokens / t.predict(parent).total_s)",
        "return next(tables[name] for name in swept)",
        [
            "tests/search/test_search.py::test_the_best_batch_size_wins_and_is_compared_with_the_parent_at_its_best"
        ],
    ),
    "dominated points stay": (
        "search/frontier.py",
        "if not kept or point.objective < kept[-1].objective:",
        "if True:",
        [
            "tests/search/test_search.py::test_a_point_that_another_one_beats_in_both_is_left_out",
            "tests/search/test_search.py::test_the_frontier_never_gets_better_with_more_throughput",
        ],
    ),
    "greedy in reverse": (
        "search/baselines.py",
        'np.argsort(means, kind="stable")',
        'np.argsort(means, kind="stable")[::-1]',
        ["tests/search/test_baselines.py"],
    ),
    "greedy without leftovers": (
        "search/baselines.py",
        "remainder = budget - program.resources[:, best]",
        "remainder = 0 * budget",
        ["tests/search/test_baselines.py"],
    ),
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: a module, the new text, where and what, and the tests that should notice."""

    module: str
    text: str
    what: str
    tests: list[str]

    @property
    def key(self) -> str:
        """The same as long as the mutant and its tests are."""
        paths = [ROOT / test.split("::")[0] for test in self.tests]
        tests = [artifacts.file_fingerprint(path) for path in paths]
        return artifacts.fingerprint([self.module, self.text, tests])


COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Add,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node of the syntax tree."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield ast.Compare(
            node.left, [COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators
        )
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield node.operand  # of a constant, -1 becomes -2: 1 would be the same axis of a matrix
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.If):
        yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Return) and not _is_nothing(node.value):
        yield ast.Return(ast.Constant(None))


def _is_nothing(node: ast.expr | None) -> bool:
    """Whether None in its place would change nothing: no value, None itself, or False."""
    return node is None or (
        isinstance(node, ast.Constant) and (node.value is None or node.value is False)
    )


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


def _left_alone(tree: ast.AST) -> set[int]:
    """Nodes of annotations, decorators, asserts, raised errors and texts, by their ids.

    Asserts tell a type checker what is known; `frozen=True` and `strict=True` keep people from
    mistakes; `non_blocking` and `pin_memory` change how long something takes.
    """
    parts: list[ast.AST] = []
    for node in ast.walk(tree):
        parts += [getattr(node, name, None) for name in ("annotation", "returns")]
        parts += getattr(node, "decorator_list", [])
        parts += [node] if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr) else []
        is_left = isinstance(node, ast.keyword) and node.arg in KEYWORDS
        parts += [node] if is_left else []
    return {id(inner) for part in parts if part is not None for inner in ast.walk(part)}


Site = tuple[str, int, int]  # module, number of the node in `ast.walk`, number of the change


def sites_of(module: str) -> list[Site]:
    """Where a module can be changed: everywhere but where `_left_alone` or `EXPLAINED` say."""
    source = (PACKAGE / module).read_text(encoding="utf-8")
    lines, explained = source.splitlines(), EXPLAINED.get(module, [])
    if lost := {*explained} - {line.strip() for line in lines}:
        raise SystemExit(f"mutants of {module}: no line is {lost.pop()!r} any more")
    tree, found = ast.parse(source), []
    left_alone = _left_alone(tree)
    for index, node in enumerate(ast.walk(tree)):
        is_explained = lines[getattr(node, "lineno", 1) - 1].strip() in explained
        if not is_explained and id(node) not in left_alone:
            found += [(module, index, number) for number, _ in enumerate(changes(node))]
    return found


def mutant_at(site: Site) -> Mutant:
    """The module with that one change."""
    module, index, number = site
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    node = list(ast.walk(tree))[index]
    new = ast.fix_missing_locations(list(changes(node))[number])
    before, after = (ast.unparse(part).splitlines()[0] for part in (node, new))
    what = f"line {getattr(node, 'lineno', 1)}: {before} -> {after}"
    changed = ast.unparse(ast.fix_missing_locations(_Replace(node, new).visit(tree)))
    return Mutant(module, changed, what, TESTS[module])


def named() -> list[Mutant]:
    """The changes that a review found unnoticed. Raises where the code they change has gone."""
    found = []
    for what, (module, old, new, tests) in NAMED.items():
        text = (PACKAGE / module).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise SystemExit(f"mutant {what!r}: {module} has {text.count(old)} times {old!r}")
        found.append(Mutant(module, text.replace(old, new), what, tests))
    return found


def fails(mutant: Mutant | None, tests: Sequence[str]) -> str | None:
    """The first of the tests that fails on a copy of the package, changed or not; None if none."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "src", Path(folder) / "output"
        shutil.copytree(PACKAGE, source / "puzzle", ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            (source / "puzzle" / mutant.module).write_text(mutant.text, encoding="utf-8")
        code = _forks().run(source, tests, output)
        if not code:
            return None
        if code < 0:
            return TIME_IS_UP
        lines = [line.split(" ", 1) for line in output.read_text(encoding="utf-8").splitlines()]
    failed = [line[1] for line in lines if line[0] in ("FAILED", "ERROR") and len(line) == 2]
    return failed[0].split(" - ")[0] if failed else "the tests cannot be collected"


class Forks:
    """A process of `pytest_forks.py`, for one test run at a time."""

    def __init__(self) -> None:
        inherited = {k: v for k, v in os.environ.items() if k != "PUZZLE_FAULTS_TALLY"}
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "benchmarks" / "pytest_forks.py")],
            cwd=ROOT,
            env=inherited | own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, source: Path, tests: Sequence[str], output: Path) -> int:
        """The exit code of pytest; negative where the time was up or a signal ended it."""
        assert self.process.stdin and self.process.stdout
        files = {"source": str(source), "output": str(output)}
        job = files | {"tests": [*tests], "timeout": MOST_S}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


_of_thread = threading.local()


def _forks() -> Forks:
    if not hasattr(_of_thread, "forks"):
        _of_thread.forks = Forks()
    return _of_thread.forks


def run(mutant: Mutant) -> dict[str, JsonValue]:
    """Run a mutant's tests: whether it was killed, and by which."""
    began = time.monotonic()
    by = fails(mutant, mutant.tests)
    return {
        "key": mutant.key,
        "module": mutant.module,
        "what": mutant.what,
        "killed": by is not None,
        "by": by or "",
        "seconds": round(time.monotonic() - began, 1),
    }


def tally(rows: list[dict[str, JsonValue]]) -> None:
    """For the table of `make test-faults`."""
    path = os.environ.get("PUZZLE_FAULTS_TALLY")
    if path:
        killed = sum(bool(row["killed"]) for row in rows)
        line = {"kind": "mutant of our code", "tried": len(rows), "survived": killed}
        with Path(path).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")


def main() -> None:
    """Print a line for every survivor, and how many were killed by module."""
    options = common.parser(__doc__, quick="two mutants of one module")
    options.add_argument("--sample", type=int, default=100, help="how many mutants")
    options.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin none after these"
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--named", action="store_true", help="those of the review instead")
    options.add_argument("--module", help="only of this one, such as search/mip.py")
    args = common.start(options)
    modules = ["data/packing.py"] if args.quick else [args.module] if args.module else list(TESTS)
    if args.named:
        chosen = named()
    else:
        pool = [site for module in modules for site in sites_of(module)]
        draw = random.Random(args.seed)
        drawn = draw.sample(pool, min(2 if args.quick else args.sample, len(pool)))
        chosen = [mutant_at(site) for site in drawn]
        print(f"{len(chosen)} of {len(pool)} mutants")
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    known = {row["key"]: row for row in map(json.loads, lines)}
    began, rows, writes = time.monotonic(), [], threading.Lock()

    def tried(mutant: Mutant) -> dict[str, JsonValue] | None:
        row = known.get(mutant.key)
        if row is None and time.monotonic() - began <= args.seconds:
            row = run(mutant)
            with writes:
                artifacts.append_line(RECORDS, row)
        return row

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        # A test that fails without any mutant cannot tell one
        needed = sorted({tuple(m.tests) for m in chosen if m.key not in known})
        for failed in workers.map(functools.partial(fails, None), needed):
            if failed:
                raise SystemExit(f"{failed} fails on the package as it is; mend that first")
        for row in workers.map(tried, chosen):
            if row is None:  # no time was left for it
                continue
            rows.append(row)
            if not row["killed"] or args.named:
                state = f"killed by {row['by']}" if row["killed"] else "SURVIVED"
                print(f"{state}: {row['module']}: {row['what']}", flush=True)
    common.print_header("module", "mutants", "killed")
    for module in sorted({str(row["module"]) for row in rows}):
        of_module = [row for row in rows if row["module"] == module]
        common.print_row(module, len(of_module), sum(bool(row["killed"]) for row in of_module))
    killed = sum(bool(row["killed"]) for row in rows)
    print(f"killed {killed} of {len(rows)}: {killed / max(len(rows), 1):.0%}")
    tally(rows)
    common.print_json(args, rows)


if __name__ == "__main__":
    main()
