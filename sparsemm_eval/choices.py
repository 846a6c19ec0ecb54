"""Words that settings are made of: they are checked before what reads them is imported."""

# What a checkpoint that ships with the package is called by, everywhere: embedded:qwen2vl.
EMBEDDED = "embedded:"
# Of a checkpoint's weights; auto takes its own.
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Of a vision tower.
ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")
# What decodes; auto takes the first of the others that runs.
BACKENDS = ("auto", "cuda_ext", "varlen", "torch")
# How the step of greedy decoding runs on one GPU.
CUDA_GRAPH = ("auto", "compile", "eager", "off")
# Methods of which are not ranked against each other.
STRATA = ("query-aware", "query-agnostic")
