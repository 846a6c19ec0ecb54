"""What results files say of their making."""

from __future__ import annotations

from typing import Any

from sparsemm_eval.bench.machine import describe, find_device
from sparsemm_eval.report.provenance import provenance


def made_by(command: str, model: str) -> dict[str, Any]:
    """Command, commit, versions, hardware, and the model's name in tables."""
    made = provenance(command)
    return {**made, "hardware": made["hardware"] | describe(find_device("")), "model": model}
