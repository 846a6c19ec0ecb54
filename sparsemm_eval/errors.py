"""What the user can mend: one error, and one check of each kind so that all errors read alike."""

import math
from collections.abc import Sequence


class UserError(ValueError):
    """Something the user can mend, in one sentence: what was given, what is allowed, how to fix it.

    The command line shows the sentence and ends with exit code 1; every other exception is a fault
    of this package and shows its traceback.
    """


def check_int(name: str, value: object, least: int) -> None:
    """Raise UserError unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name}={value!r}: it must be an integer of at least {least}")


def check_share(name: str, value: object) -> None:
    """Raise UserError unless ``value`` is a number in 0..1."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= 1:
        raise UserError(f"{name}={value!r}: it must be a number from 0 to 1")


def one_line(error: BaseException) -> str:
    """An exception's words in one line, for a sentence that states it as the cause."""
    return " ".join(str(error).split())[:500]


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise UserError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise UserError(f"{name}={value!r}: it must be one of {', '.join(allowed)}")
