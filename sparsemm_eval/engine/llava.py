"""LLaVA-NeXT (Vicuna, Mistral and other backbones) on a head-budgeted cache."""

from sparsemm_eval.engine.wrapper import SparseMMModel


class LlavaSparseMM(SparseMMModel):
    """``--model llava_sparsemm``: a LlavaNextForConditionalGeneration checkpoint."""

    model_id = "llava_sparsemm"
    model_type = "llava_next"
