"""The errors people see. Everything else that escapes is our bug and keeps its traceback.

Exit codes: 0 done, 1 our bug, 2 `UserError`, 3 `Infeasible`.
"""

import errno

LONGEST = 4000  # of a message, in characters
OF_THE_MACHINE = {  # errors of files that users can mend, and how
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOSPC: "free some space; the same command goes on from here",
    errno.EDQUOT: "free some space; the same command goes on from here",
    errno.EIO: "check the disk; the same command goes on from here",
    errno.EISDIR: "expected a file there",
    errno.ENOTDIR: "expected a folder there",
    errno.EEXIST: "expected a folder there, or nothing",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle; remove one",
}


def reason(error: BaseException) -> str:
    """What an exception of another library says, in one line of at most 200 characters."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).split())
    if isinstance(error, LookupError | AttributeError | TypeError):  # says little by itself
        text = f"{type(error).__name__}: {text}"
    return f"{text[:197]}..." if len(text) > 200 else text or type(error).__name__


class UserError(ValueError):
    """The user's input is wrong. The message is one line: what, got, expected, how to mend.

    Names in a stranger's file can be of any length and hold anything: of a very long message the
    middle is left out, and characters that do not print are shown as Python writes them.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        half = LONGEST // 2
        is_long = len(message) > LONGEST
        super().__init__(f"{message[:half]} ... {message[-half:]}" if is_long else message)


class Infeasible(UserError):
    """No architecture meets the constraints, or the measured child misses them.

    The message names what binds and the best attainable value, or what was asked and measured.
    """

    exit_code = 3


def mendable(error: OSError) -> UserError | None:
    """An error of files that the user can mend, as one line; None for any other."""
    if error.errno not in OF_THE_MACHINE:
        return None
    what = f"{error.filename}: " if error.filename is not None else ""
    return UserError(f"{what}{error.strerror}; {OF_THE_MACHINE[error.errno]}")
