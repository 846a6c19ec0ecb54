"""What lmms-eval finds at the entry point. Imports nothing heavy.

One plugin that fails on import takes all others with it, and lmms-eval only warns.
"""

from lmms_eval.models.registry_v2 import ModelManifest

manifests = [
    ModelManifest(
        model_id="llava_sparsemm",
        chat_class_path="sparsemm_eval.models.llava.LlavaSparseMM",
    ),
    ModelManifest(
        model_id="qwen2vl_sparsemm",
        chat_class_path="sparsemm_eval.models.qwen2vl.Qwen2VLSparseMM",
    ),
]
