"""What lmms-eval finds at the entry point. Imports nothing.

One plugin that fails on import takes all others with it, and lmms-eval only warns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> list[ModelManifest]:
    """The models of this package, for lmms-eval's registry."""
    # Not above: lmms_eval.models loads this module while it is imported itself, and whoever
    # imports this module first would meet it half made.
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="llava_sparsemm",
            chat_class_path="sparsemm_eval.engine.llava.LlavaSparseMM",
        ),
        ModelManifest(
            model_id="qwen2vl_sparsemm",
            chat_class_path="sparsemm_eval.engine.qwen2vl.Qwen2VLSparseMM",
        ),
    ]
