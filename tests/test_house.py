"""The rules of `tools/house.py` find what they forbid, hold for the tree, and the page names it."""

import re
import sys
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "puzzle"
PAGE = ROOT / "docs" / "architecture.md"


@pytest.fixture
def package(tmp_path):
    """A small package that keeps every rule."""
    folder = tmp_path / "small"
    plant(folder, "__init__.py", "")
    plant(folder, "top.py", "from small.room import shared\n\nassert len(shared.NAMES) < 9\n")
    plant(folder, "room/__init__.py", "NAME = 'room'\n")
    plant(folder, "room/shared.py", "from small.room import NAME\n\nNAMES = [NAME]\n")
    return folder


def plant(folder, path, text):
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(text)


def problems(folder, capsys):
    """What the script prints below its table; its exit code must agree."""
    code = house.main([str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert code == (1 if len(lines) > len(house.RULES) else 0)
    return lines[len(house.RULES) :]


def test_the_tree_keeps_every_rule(capsys):
    assert problems(PACKAGE, capsys) == []


def test_a_package_that_keeps_every_rule_passes(package, capsys):
    assert problems(package, capsys) == []


PLANTED = {
    "a long module": ({"room/long.py": "x = 1\n" * 501}, ["room/long.py: 501 lines"]),
    "long modules everywhere": (
        {f"room/m{index}.py": "x = 1\n" * 200 for index in range(5)},
        ["the median module has 200 lines"],
    ),
    "files beside the rooms": (
        {f"m{index:02}.py": "" for index in range(13)},
        [f"beside the rooms: __init__.py, {', '.join(f'm{i:02}.py' for i in range(13))}, top.py"],
    ),
    "a computed import": (
        {
            "room/plugin.py": "import importlib\n\n\ndef load(name):\n"
            "    return importlib.import_module(name)\n",
            "room/other.py": "json = __import__('json')\n",
        },
        [
            "room/other.py:1: __import__; write an import statement",
            "room/plugin.py:5: import_module; write an import statement",
        ],
    ),
    "a computed import under another name": (
        {"room/plugin.py": "from importlib import import_module as load\n"},
        ["room/plugin.py:1: import_module; write an import statement"],
    ),
    "fmt: skip": (
        {"room/table.py": "x = 1  # fmt: skip\n" * 9 + "y = '# fmt: skip'\n# fmt: off\n"},
        [f"room/table.py:{line}: # fmt: skip" for line in range(1, 10)]
        + ["room/table.py:11: # fmt: off"],
    ),
    "seven parameters": (
        {
            "room/wide.py": "def wide(a, b, /, c, d, *e, f, **g): ...\n\n\n"
            "class Thing:\n"
            "    def six(self, a, b, c, d, e, f): ...\n\n"
            "    async def seven(self, a, b, c, d, e, f, g): ...\n\n"
            "    def outer(self):\n"
            "        def inner(a, b, c, d, e, f, g): ...\n"
        },
        [
            "room/wide.py:1: wide has 7 parameters",
            "room/wide.py:7: Thing.seven has 7 parameters",
            "room/wide.py:10: Thing.outer.inner has 7 parameters",
        ],
    ),
    "an assert that does something": (
        {
            "room/check.py": "def check(names, left):\n"
            "    assert isinstance(names, list) and len(names) > 2\n"
            "    assert names.pop() == 'last', 'the last name is missing'\n"
            "    assert (size := len(names))\n"
            "    return size, left\n"
        },
        [
            "room/check.py:3: an assert calls names.pop",
            "room/check.py:4: an assert sets a variable",
        ],
    ),
}


@pytest.mark.parametrize(("files", "expected"), PLANTED.values(), ids=PLANTED.keys())
def test_what_breaks_a_rule_is_named(package, capsys, files, expected):
    for path, text in files.items():
        plant(package, path, text)
    assert problems(package, capsys) == expected


def test_sixty_lines_with_any_are_too_many_wherever_it_is_written(package, capsys):
    lines = ["from typing import Any", "import typing", "def f(x: 'list[Any]') -> typing.Any: ..."]
    lines += ["x: dict[Any, Any] = {}"] * 57 + ["text = 'Any'  # Any"]
    plant(package, "room/loose.py", "\n".join(lines) + "\n")
    assert problems(package, capsys) == []
    plant(package, "room/looser.py", "from typing import Any as Whatever\n")
    places = problems(package, capsys)
    assert len(places) == 60
    assert places[:2] == ["room/loose.py:1: Any", "room/loose.py:3: Any"]
    assert places[-1] == "room/looser.py:1: Any"


CIRCLES = {
    "two modules": (
        {"room/a.py": "import small.room.b\n", "room/b.py": "from small.room import a\n"},
        ["small.room.a -> small.room.b -> small.room.a"],
    ),
    "through a module in a try": (
        {
            "room/a.py": "from small.room.b import x\n",
            "room/b.py": "try:\n    from .c import x\nexcept ImportError:\n    x = None\n",
            "room/c.py": "class C:\n    from .. import room\n    from ..room import a\n",
        },
        ["small.room.a -> small.room.b -> small.room.c -> small.room.a"],
    ),
    "a room and its own module": (
        {"room/__init__.py": "from small.room.shared import NAMES\n\nNAME = 'room'\n"},
        ["small.room -> small.room.shared -> small.room"],
    ),
    "a room and another": (
        {
            "den/__init__.py": "from small.room import NAME\n",
            "den/file.py": "",
            "room/__init__.py": "import small.den.file\n\nNAME = 'room'\n",
        },
        ["small.den -> small.room -> small.den"],
    ),
}


@pytest.mark.parametrize(("files", "expected"), CIRCLES.values(), ids=CIRCLES.keys())
def test_an_import_circle_is_named(package, capsys, files, expected):
    for path, text in files.items():
        plant(package, path, text)
    assert problems(package, capsys) == [f"import circle: {circle}" for circle in expected]


@pytest.mark.parametrize(
    "text",
    [
        "def later():\n    from small.room import b\n    return b\n",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from small.room import b\n",
        "import typing\n\nif typing.TYPE_CHECKING:\n    import small.room.b\n",
    ],
)
def test_imports_that_come_later_make_no_circle(package, capsys, text):
    plant(package, "room/a.py", text)
    plant(package, "room/b.py", "from small.room import a\n")
    assert problems(package, capsys) == []


def test_the_circles_that_are_found_are_those_that_python_meets(package, capsys, monkeypatch):
    """The oracle is the interpreter: the same two modules with a name taken from one another."""
    plant(package, "room/a.py", "from small.room.b import B\n\nA = 1\n")
    plant(package, "room/b.py", "from small.room.a import A\n\nB = 2\n")
    assert problems(package, capsys)
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(ImportError, match="circular import"):
        import small.room.a  # noqa: F401
    for name in [name for name in sys.modules if name.split(".")[0] == "small"]:
        del sys.modules[name]


@pytest.mark.training
def test_every_exception_is_needed():
    """A function that keeps the rule again leaves the list of those that may break it."""
    tree = house.read(PACKAGE)
    for place in house.MORE_PARAMETERS:
        others = {other: "" for other in house.MORE_PARAMETERS if other != place}
        assert house.parameters(tree, others).problems, f"{place} needs no exception"


# ----------------------------------------------------------------------------------- the page


def modules():
    """Every module as the page names it: a room's `__init__.py` by its folder."""
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    rooms = {f"{path.parent.as_posix()}/" for path in paths if path.name == "__init__.py"}
    files = {path.as_posix() for path in paths if path.name != "__init__.py"}
    return files | (rooms - {"./"})


def named():
    """Every module and every folder of the package that the page names."""
    return set(re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+(?:\.py|/))`", PAGE.read_text()))


def test_the_page_on_architecture_names_every_module():
    assert modules() - named() == set()


def test_the_page_on_architecture_names_no_module_that_is_not_there():
    """A name without its folder, such as `__init__.py`, may be any module's."""
    there = modules() | {path.name for path in PACKAGE.rglob("*.py")}
    files = {name for name in named() if name.endswith(".py")}
    assert {name for name in files - there if not (ROOT / name).exists()} == set()
