"""The errors people see. Everything else that escapes is our bug and keeps its traceback.

Exit codes: 0 done, 1 our bug, 2 `UserError`, 3 `Infeasible`.
"""


def reason(error: BaseException) -> str:
    """What an exception of another library says, in one line of at most 200 characters."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).split())
    if isinstance(error, LookupError | AttributeError | TypeError):  # says little by itself
        text = f"{type(error).__name__}: {text}"
    return f"{text[:197]}..." if len(text) > 200 else text or type(error).__name__


class UserError(ValueError):
    """The user's input is wrong. The message is one line: what, got, expected, how to mend."""

    exit_code = 2


class Infeasible(UserError):
    """No architecture meets the constraints, or the measured child misses them.

    The message names what binds and the best attainable value, or what was asked and measured.
    """

    exit_code = 3
