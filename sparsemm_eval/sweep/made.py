"""What results files say of their making."""

from __future__ import annotations

from typing import Any

from sparsemm_eval.bench.machine import find_device, provenance_on


def made_by(command: str, model: str) -> dict[str, Any]:
    """Command, commit, versions, hardware, and the model's name in tables."""
    return {**provenance_on(find_device(), command), "model": model}
