import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsemm_eval.tiny.checkpoint import (
    CHARACTERS,
    UNKNOWN,
    VOCABULARY,
    build_model,
    build_processor,
    encode,
    export,
)
from sparsemm_eval.tiny.documents import PAGE, Layout, Split, draw_document, stream
from sparsemm_eval.tiny.packing import (
    IGNORED,
    Packing,
    choose_questions,
    draw_batch,
    pack,
    patchify,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("untrained")
    export(build_model(seed=1), path, "# Untrained\n")
    return path


def prompt(processor, text):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def test_an_untrained_model_round_trips_in_bfloat16(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    expected = build_model(seed=1).to(torch.bfloat16).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (folder / "README.md").read_text(encoding="utf-8") == "# Untrained\n"


@pytest.mark.parametrize("layout", [Layout(2, 11, 1, 2), PAGE, Layout(20, 22, 10, 20)])
def test_a_page_becomes_one_image_token_a_cell(folder, layout):
    processor = AutoProcessor.from_pretrained(folder)
    page = draw_document(stream(Split.HELD_OUT, 0), layout)
    inputs = processor(text=[prompt(processor, "?MAP:")], images=[page.image], return_tensors="pt")
    image_token = VOCABULARY["<|image_pad|>"]
    assert int((inputs["input_ids"] == image_token).sum()) == layout.image_tokens
    assert inputs["input_ids"].shape[1] == layout.image_tokens + 2 + len("?MAP:")
    grey = np.array(page.image)[None, :, :, 0]
    torch.testing.assert_close(patchify(grey), inputs["pixel_values"])


def test_any_english_prompt_is_one_token_a_character(folder):
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    text = CHARACTERS + "\nAnswer the question using a single word or phrase."
    tokens = tokenizer(text)["input_ids"]
    assert tokens == encode(text)
    assert len(tokens) == len(text)
    assert VOCABULARY[UNKNOWN] not in tokens
    assert tokenizer.decode(tokens) == text
    assert tokenizer("é")["input_ids"] == [VOCABULARY[UNKNOWN]] == encode("é")
    assert tokenizer.padding_side == "left"


def test_the_chat_template_adds_nothing_but_the_image_and_ends_an_answer():
    processor = build_processor()
    assert prompt(processor, "?MAP:") == "<|vision_start|><|image_pad|><|vision_end|>?MAP:"
    turns = [{"role": "user", "content": "?MAP:"}, {"role": "assistant", "content": "A1B"}]
    assert processor.apply_chat_template(turns) == "?MAP:A1B<|im_end|>"


@torch.no_grad()
def test_packed_questions_see_exactly_what_a_lone_question_sees(folder):
    model, processor = build_model(seed=1), build_processor()
    packing = Packing(Layout(4, 11, 3, 4), documents=2, tokens=90, onward=1)
    pages = [draw_document(stream(Split.TRAIN, 0, n), packing.layout) for n in range(2)]
    asked = [choose_questions(stream(Split.TRAIN, 1, 0), page, packing) for page in pages]
    batch = pack(pages, asked, packing.tokens)
    core = model.model
    seen = core.visual(batch.pixel_values, batch.grid_thw).pooler_output
    is_image = (batch.input_ids == VOCABULARY["<|image_pad|>"]).unsqueeze(-1)
    hidden = core.language_model(
        inputs_embeds=core.language_model.embed_tokens(batch.input_ids).masked_scatter(
            is_image, seen
        ),
        attention_mask=batch.mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    number = 0
    for row, (page, questions) in enumerate(zip(pages, asked, strict=True)):
        for _, question in questions:
            text = prompt(processor, question.prompt) + question.answer
            inputs = processor(text=[text], images=[page.image], return_tensors="pt")
            alone = model.model(**inputs).last_hidden_state[0, packing.layout.image_tokens + 2 :]
            packed = hidden[row, batch.blocks[row] == number][:-1]
            torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
            number += 1
    assert number == len(batch.kinds)


def test_labels_are_the_answers_and_their_end():
    packing = Packing(Layout(4, 11, 3, 4), documents=1, tokens=90, onward=1)
    rng = stream(Split.TRAIN, 5, 0)
    page = draw_document(rng, packing.layout)
    asked = choose_questions(rng, page, packing)
    batch = draw_batch(packing, Split.TRAIN, 5, 0)
    characters = list(VOCABULARY)
    for number, (_, question) in enumerate(asked):
        labels = batch.labels[0, batch.blocks[0] == number]
        tokens = [characters[label] for label in labels[labels != IGNORED].tolist()]
        assert tokens == [*question.answer, "<|im_end|>"]
    assert bool((batch.labels[batch.blocks < 0] == IGNORED).all())
