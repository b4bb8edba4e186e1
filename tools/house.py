"""The rules of this code base that no linter knows: sizes, import circles, signatures, asserts.

    python tools/house.py [PACKAGE_FOLDER]

Prints one line per rule. Where a rule is broken it names every place and exits with 1. `make lint`
runs it; it needs the standard library only and imports nothing of the package.
"""

import ast
import io
import statistics
import sys
import tokenize
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

LONGEST_MODULE, MEDIAN_BELOW = 500, 200  # lines
TOP_LEVEL_MODULES = 14
FMT_BELOW = 10
ANY_BELOW = 60  # lines
PARAMETERS = 6

# Functions that may have more parameters, as `path:name`, and why.
MORE_PARAMETERS = {
    "commands/children.py:child": "a command's parameters are its options",
    "cli.py:cost": "a command's parameters are its options",
    "cli.py:plan": "a command's parameters are its options",
    "commands/serving.py:measure": "a command's parameters are its options",
    "commands/questions.py:search": "a command's parameters are its options",
    "model/modeling_puzzle.py:Puzzle*.forward": "transformers calls it by these names",
    "training/losses.py:_DistillationLoss.forward": "torch.autograd.Function takes bare tensors",
}

# What an assert may call: nothing that changes anything.
PURE = {"all", "any", "callable", "hasattr", "isinstance", "issubclass", "len", "set", "sorted"}
PURE |= {"endswith", "exists", "is_dir", "is_file", "isfinite", "keys", "startswith", "values"}

DYNAMIC_IMPORTS = {"__import__", "import_module"}
Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """One file of the package, parsed."""

    name: str  # dotted: `puzzle.model.child`; a package's is its folder's
    path: str  # within the package: `model/child.py`
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        """How long it is."""
        return len(self.text.splitlines())

    @property
    def package(self) -> str:
        """The dotted name that its relative imports start from."""
        return self.name if self.path.endswith("__init__.py") else self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Finding:
    """What one rule has found: a figure beside its limit, and every place that breaks the rule."""

    rule: str
    figure: str
    limit: str
    problems: list[str]


Package = dict[str, Module]  # by dotted name
Rule = Callable[[Package], Finding]


def read(folder: Path) -> Package:
    """Every module below a package's folder."""
    package = {}
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        parts = [folder.name, *relative.with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        package[name] = Module(name, relative.as_posix(), text, ast.parse(text, str(path)))
    return package


# -------------------------------------------------------------------------------------------- sizes


def longest_module(package: Package) -> Finding:
    """No module has more than `LONGEST_MODULE` lines."""
    problems = [
        f"{module.path}: {module.lines} lines"
        for module in package.values()
        if module.lines > LONGEST_MODULE
    ]
    longest = max(module.lines for module in package.values())
    return Finding("longest module", f"{longest} lines", f"at most {LONGEST_MODULE}", problems)


def median_module(package: Package) -> Finding:
    """The median module is short."""
    median = statistics.median(module.lines for module in package.values())
    problems = [f"the median module has {median:g} lines"] if median >= MEDIAN_BELOW else []
    return Finding("median module", f"{median:g} lines", f"below {MEDIAN_BELOW}", problems)


def top_level_modules(package: Package) -> Finding:
    """A file lives in a room; few are shared by all rooms and lie beside them."""
    paths = [module.path for module in package.values() if "/" not in module.path]
    problems = [f"beside the rooms: {', '.join(paths)}"] if len(paths) > TOP_LEVEL_MODULES else []
    limit = f"at most {TOP_LEVEL_MODULES}"
    return Finding("modules beside the rooms", str(len(paths)), limit, problems)


def format_skips(package: Package) -> Finding:
    """The formatter decides the layout, with few exceptions."""
    places = [
        f"{module.path}:{token.start[0]}: {token.string}"
        for module in package.values()
        for token in tokenize.generate_tokens(io.StringIO(module.text).readline)
        if token.type == tokenize.COMMENT
        and any(mark in token.string for mark in ("fmt: skip", "fmt: off"))
    ]
    problems = places if len(places) >= FMT_BELOW else []
    return Finding("fmt: skip", str(len(places)), f"below {FMT_BELOW}", problems)


# ---------------------------------------------------------------------------------------- imports


def import_circles(package: Package) -> Finding:
    """No module needs itself to be imported. Imports inside functions do not count."""
    imports = {name: set(_imported_modules(module, package)) for name, module in package.items()}
    circles: dict[frozenset[str], list[str]] = {}
    for name in imports:
        circle = _shortest_circle(name, imports)
        if circle is not None:
            circles.setdefault(frozenset(circle), circle)
    problems = [f"import circle: {' -> '.join(circle)}" for circle in circles.values()]
    return Finding("import circles", str(len(circles)), "none", problems)


def _imported_modules(module: Module, package: Package) -> Iterator[str]:
    """The package's modules that importing this one imports, and the folders above them.

    A folder above the module itself is being imported already; it counts only where the module
    takes a name from it.
    """
    for node in _import_time(module.tree.body):
        for target, is_named in _targets(node, module, package):
            parts = target.split(".")
            names = [".".join(parts[: index + 1]) for index in range(len(parts))]
            for name in names:
                is_above = f"{module.package}.".startswith(f"{name}.")
                if name in package and (not is_above or (is_named and name == target)):
                    yield name


def _targets(node: ast.stmt, module: Module, package: Package) -> Iterator[tuple[str, bool]]:
    """(module, whether a name is taken from it) of an import statement."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, False) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        source = node.module or ""
        if node.level:
            above = module.package.split(".")
            source = ".".join(above[: len(above) - node.level + 1] + source.split(".")).strip(".")
        for alias in node.names:
            submodule = f"{source}.{alias.name}"
            yield (submodule, True) if submodule in package else (source, True)


def _import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported."""
    for node in body:
        if isinstance(node, FUNCTIONS):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _import_time(node.orelse)
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from _import_time(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from _import_time(handler.body)


def _shortest_circle(start: str, imports: Mapping[str, set[str]]) -> list[str] | None:
    """The shortest way from a module back to itself, both ends named."""
    paths = deque([[start]])
    seen = set()
    while paths:
        path = paths.popleft()
        for name in sorted(imports[path[-1]]):
            if name == start:
                return [*path, name]
            if name not in seen:
                seen.add(name)
                paths.append([*path, name])
    return None


def computed_imports(package: Package) -> Finding:
    """Every import is a statement; that of an optional package stands in a function."""
    problems = []
    for module in package.values():
        for node in ast.walk(module.tree):
            if _name(node) in DYNAMIC_IMPORTS:
                line = getattr(node, "lineno", 0)
                problems.append(f"{module.path}:{line}: {_name(node)}; write an import statement")
    return Finding("computed imports", str(len(problems)), "none", problems)


def _name(node: ast.AST) -> str:
    """The last part of a name, an attribute or an imported name; empty for everything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.name if isinstance(node, ast.alias) else ""


# ------------------------------------------------------------------------------------------- types


def lines_with_any(package: Package) -> Finding:
    """`Any` is for what foreign packages hand over."""
    places = []
    for module in package.values():
        lines = {node.lineno for node in _names_and_types(module.tree) if _name(node) == "Any"}
        places += [f"{module.path}:{line}: Any" for line in sorted(lines)]
    problems = places if len(places) >= ANY_BELOW else []
    return Finding("lines with Any", str(len(places)), f"below {ANY_BELOW}", problems)


def _names_and_types(tree: ast.Module) -> Iterator[ast.expr | ast.alias]:
    """Every expression and imported name, those inside quoted types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.expr | ast.alias):
            yield node
        for field in ("annotation", "returns"):
            annotation = getattr(node, field, None)
            if annotation is not None:
                yield from _quoted(annotation)


def _quoted(annotation: ast.expr) -> Iterator[ast.expr]:
    """The expressions inside the quoted types of an annotation, each at its place."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                expression = ast.parse(node.value, mode="eval")
            except SyntaxError:  # a text, as in `Annotated`
                continue
            for inner in ast.walk(expression):
                if isinstance(inner, ast.expr):
                    yield ast.copy_location(inner, node)


# --------------------------------------------------------------------------------------- functions


def parameters(package: Package, exceptions: Mapping[str, str] = MORE_PARAMETERS) -> Finding:
    """A function has at most `PARAMETERS` parameters, `self` and `cls` not counted."""
    problems, most = [], 0
    for module in package.values():
        for name, function in _functions(module.tree):
            place, count = f"{module.path}:{name}", _parameter_count(name, function)
            if any(fnmatch(place, pattern) for pattern in exceptions):
                continue
            most = max(most, count)
            if count > PARAMETERS:
                problems.append(f"{module.path}:{function.lineno}: {name} has {count} parameters")
    return Finding("parameters of a function", str(most), f"at most {PARAMETERS}", problems)


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Every function with its qualified name, methods and nested ones too."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, FUNCTIONS):
            yield prefix + inner.name, inner
        if isinstance(inner, (*FUNCTIONS, ast.ClassDef)):
            yield from _functions(inner, f"{prefix}{inner.name}.")
        else:
            yield from _functions(inner, prefix)


def _parameter_count(name: str, function: Function) -> int:
    arguments = function.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if "." in name and positional[:1] in (["self"], ["cls"]):
        positional = positional[1:]
    variable = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return len(positional) + len(arguments.kwonlyargs) + len(variable)


def side_effects_in_asserts(package: Package) -> Finding:
    """`python -O` leaves asserts out: what they call must change nothing."""
    problems = []
    for module in package.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Assert) and (reason := _side_effect(node.test)):
                problems.append(f"{module.path}:{node.lineno}: an assert {reason}")
    return Finding("side effects in asserts", str(len(problems)), "none", problems)


def _side_effect(test: ast.expr) -> str:
    """What an assert's test does beyond looking; empty where it only looks."""
    for node in ast.walk(test):
        if isinstance(node, ast.NamedExpr):
            return "sets a variable"
        if isinstance(node, ast.Call) and _name(node.func) not in PURE:
            return f"calls {ast.unparse(node.func)}"
    return ""


# --------------------------------------------------------------------------------------- the table

RULES: tuple[Rule, ...] = (
    longest_module,
    median_module,
    top_level_modules,
    format_skips,
    import_circles,
    computed_imports,
    lines_with_any,
    parameters,
    side_effects_in_asserts,
)


def main(arguments: list[str]) -> int:
    """Print the table; 1 where a rule is broken."""
    default = Path(__file__).resolve().parent.parent / "src" / "puzzle"
    package = read(Path(arguments[0]) if arguments else default)
    findings = [rule(package) for rule in RULES]
    for finding in findings:
        state = "exceeded" if finding.problems else ""
        print(f"{finding.rule:<26}{finding.figure:>10}   {finding.limit:<14}{state}".rstrip())
    problems = [problem for finding in findings for problem in finding.problems]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
