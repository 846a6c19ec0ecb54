"""What the user can mend: one error, and one check of each kind so that all errors read alike."""

import re
import reprlib
from collections.abc import Sequence

# Characters that move a terminal's cursor, turn the direction of writing, or are half of one.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_LONGEST = 60


class UserError(ValueError):
    """Something the user can mend, in one sentence: what was given, what is allowed, how to fix it.

    The command line shows the sentence and ends with exit code 1; every other exception is a fault
    of this package and shows its traceback.
    """


def check_int(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise UserError unless ``value`` is an integer of at least ``least`` and at most ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name}={short_repr(value)}: it must be an integer of at least {least}")
    if most is not None and value > most:
        raise UserError(f"{name}={short_repr(value)}: it must be at most {most}")


def check_share(name: str, value: object) -> None:
    """Raise UserError unless ``value`` is a number in 0..1."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise UserError(f"{name}={short_repr(value)}: it must be a number from 0 to 1")


def one_line(error: BaseException) -> str:
    """An exception's words in one line, for a sentence that states it as the cause."""
    return printable(" ".join(str(error)[:5000].split())[:500])


def printable(text: str) -> str:
    """A name or a word from a file, in one line that a terminal shows as it stands.

    What controls a terminal (line ends, escape sequences, bidirectional overrides) is written as
    Python escapes it, so that no name can pass for another or for a line of its own.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Short(reprlib.Repr):
    """Looks at the beginning of a value alone, however much it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 12
        self.maxstring = self.maxother = 4 * _LONGEST  # of which the end is cut off

    def repr_int(self, value: int, level: int) -> str:
        bits = value.bit_length()  # Python refuses to write thousands of digits
        return repr(value) if bits <= 128 else f"an integer of {bits:,} bits"


_SHORT = _Short()


def short_repr(value: object) -> str:
    """A value as Python writes it, cut off where that is long, before it is written out."""
    text = _SHORT.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise UserError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise UserError(f"{name}={short_repr(value)}: it must be one of {', '.join(allowed)}")
