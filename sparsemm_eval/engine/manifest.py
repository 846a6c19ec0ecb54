"""What lmms-eval finds at the entry point. Imports nothing.

One plugin that fails on import takes all others with it, and lmms-eval only warns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

# Any family by its checkpoint, and the two that the paper ran by their own names.
MODELS = {
    "sparsemm": "SparseMM",
    "llava_sparsemm": "LlavaSparseMM",
    "qwen2vl_sparsemm": "Qwen2VLSparseMM",
}


def manifests() -> list[ModelManifest]:
    """The models of this package, for lmms-eval's registry."""
    # Not above: lmms_eval.models loads this module while it is imported itself, and whoever
    # imports this module first would meet it half made.
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=name,
            simple_class_path=f"sparsemm_eval.engine.lmms.Simple{model}",
            chat_class_path=f"sparsemm_eval.engine.lmms.{model}",
        )
        for name, model in MODELS.items()
    ]
