"""One wrong input: what is typed, with which files, and the one line that answers it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """A command in a folder that holds `parent`, `text` and a run that has not begun, `run`.

    `…` in the message stands for words of another library.
    """

    name: str
    arguments: list[str]
    message: str
    files: dict[str, str | bytes] = field(default_factory=dict)
    stays: bool = True  # whether the folder stays as it was; some things show only in the work


def recipe(name: str, text: str | bytes, message: str) -> Case:
    """A recipe file that is wrong."""
    return Case(name, ["run", "r.yaml"], message, {"r.yaml": text})


def setting(assignment: str, message: str) -> Case:
    """A setting that is wrong, in a recipe that is otherwise good."""
    return Case(f"--set {assignment}", ["run", "good.yaml", "--set", assignment], message)
