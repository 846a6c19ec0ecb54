"""How near a cell's answers are to full KV's: no label is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sparsemm_eval.engine.answers import Answer


def fidelity(cell: Mapping[str, Answer], full: Mapping[str, Answer]) -> dict[str, Any]:
    """Compare a cell's answers with full KV's on the same documents.

    Parameters
    ----------
    cell, full : mapping of str to Answer
        Of one model and task, by key.

    Returns
    -------
    dict
        compared: documents that both answered; same_answer: share of them with equal text;
        first_difference: index of the first new token that differs, mean over the answers whose
        tokens differ; kl_full: KL divergence in nats of the cell's next-token distribution from
        full KV's, mean over the documents where it was measured; kl_missing: documents where it
        was not, as full KV had its answer already when theirs was computed. None where there is
        nothing to take a mean of.
    """
    both = _frame(cell).join(_frame(full).add_suffix("_full"), how="inner")
    if both.empty:
        nothing = dict.fromkeys(("same_answer", "first_difference", "kl_full"))
        return {"compared": 0, **nothing, "kl_missing": 0}
    places = pd.Series(
        [_first_difference(*pair) for pair in zip(both["tokens"], both["tokens_full"], strict=True)]
    )
    return {
        "compared": len(both),
        "same_answer": float((both["text"] == both["text_full"]).mean()),
        "first_difference": _mean(places),
        "kl_full": _mean(both["kl"]),
        # An answer without a token has no second one to compare.
        "kl_missing": int((both["tokens"].map(bool) & both["kl"].isna()).sum()),
    }


def _frame(answers: Mapping[str, Answer]) -> pd.DataFrame:
    # In the order of the documents, so that a mean is the same to the last bit on every run.
    rows = sorted(
        (answer.doc_id, answer.text, answer.record.get("tokens"), answer.record.get("kl_full"))
        for answer in {answer.doc_id: answer for answer in answers.values()}.values()
    )
    frame = pd.DataFrame(rows, columns=["document", "text", "tokens", "kl"])
    return frame.astype({"kl": float}).set_index("document")


def _first_difference(one: Sequence[int] | None, other: Sequence[int] | None) -> int | None:
    if one is None or other is None or one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _mean(values: pd.Series) -> float | None:
    mean = values.astype(float).mean()
    return None if pd.isna(mean) else float(mean)
