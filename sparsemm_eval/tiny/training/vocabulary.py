"""One token a character: the vocabulary that both tiny models share."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, IM_START, IM_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD, UNKNOWN = "<|image_pad|>", "<|video_pad|>", "<|unk|>"
SPECIAL_TOKENS = (
    PAD,
    IM_START,
    IM_END,
    VISION_START,
    VISION_END,
    IMAGE_PAD,
    VIDEO_PAD,
    UNKNOWN,
)
CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
VOCABULARY: dict[str, int] = {
    token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))
}


def encode(text: str) -> list[int]:
    """Return the token of every character; a character outside the vocabulary is unknown.

    Parameters
    ----------
    text : str
        Text without special tokens.

    Returns
    -------
    list of int
        As long as the text.
    """
    unknown = VOCABULARY[UNKNOWN]
    return [VOCABULARY.get(char, unknown) for char in text]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token a character, padding on the left."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=IM_START,
        eos_token=IM_END,
        unk_token=UNKNOWN,
        additional_special_tokens=[VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def chat_template(image: str) -> str:
    """Return a template that writes nothing but the content, and ``image`` for an image.

    The prompt stays as short as the image allows, and the answer follows the question as the
    value follows the key on the page.
    """
    return (
        "{% for message in messages %}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% elif "
        "part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% if message['role'] == 'assistant' %}" + IM_END + "{% endif %}"
        "{% endfor %}"
    )
