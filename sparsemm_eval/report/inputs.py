"""What commands that show results are given, checked before anything is imported to show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from sparsemm_eval.errors import UserError

PAPER = "paper"
# The table and the figure of which method is best at equal bytes.
RANKING = "ranking"
# What figures are of, and the formats that they are written in.
FIGURES = ("budget", "kept", RANKING, "efficiency", "heads")
FIGURE_FORMATS = ("svg", "png", "pdf")


def check_inputs(results: Iterable[str | Path]) -> None:
    """Raise UserError for what is neither a path that exists nor the word paper."""
    for given in results:
        if given != PAPER and not Path(given).exists():
            raise UserError(
                f"{given}: there is no such file or folder; give results files, folders that hold "
                f"some, or the word {PAPER}"
            )


def check_formats(formats: Sequence[str]) -> None:
    """Raise UserError unless these are formats in which figures are written."""
    allowed = ", ".join(FIGURE_FORMATS)
    if not formats:
        raise UserError(f"format='': it must be one or more of {allowed}, such as svg,png")
    for form in formats:
        if form not in FIGURE_FORMATS:
            raise UserError(f"format={form!r}: it must be one or more of {allowed}")
