import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsemm_eval.tiny.documents import PAGE, Layout, Split, draw_document, stream
from sparsemm_eval.tiny.pictures import Kind
from sparsemm_eval.tiny.training.family import FAMILIES, export
from sparsemm_eval.tiny.training.packing import (
    IGNORED,
    Packing,
    choose_questions,
    draw_batch,
    draw_pictures,
    pack,
)
from sparsemm_eval.tiny.training.train import lend
from sparsemm_eval.tiny.training.vocabulary import (
    CHARACTERS,
    IMAGE_PAD,
    UNKNOWN,
    VOCABULARY,
    encode,
)

# LLaVA-NeXT needs 22 columns and an odd number of rows for a cell to be a patch of a tile.
SMALL = {"qwen2vl": Layout(4, 11, 3, 4), "llava_next": Layout(3, 22, 3, 4)}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    path = tmp_path_factory.mktemp("untrained") / family.name
    export(family, family.build_model(seed=1), path, "# Untrained\n")
    return path


def prompt(processor, text):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def test_an_untrained_model_round_trips_in_bfloat16(family, folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    expected = family.build_model(seed=1).to(torch.bfloat16).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (folder / "README.md").read_text(encoding="utf-8") == "# Untrained\n"


@pytest.mark.parametrize("layout", [Layout(3, 22, 1, 2), PAGE, Layout(20, 22, 10, 20)])
def test_training_sees_what_the_processor_makes(family, folder, layout):
    processor = AutoProcessor.from_pretrained(folder)
    page = draw_document(stream(Split.HELD_OUT, 0), layout)
    inputs = processor(text=[prompt(processor, "?MAP:")], images=[page.image], return_tensors="pt")
    tokens, _ = family.prefix(layout)
    assert inputs["input_ids"][0].tolist() == [*tokens.tolist(), *encode("?MAP:")]
    for name, values in family.pixels([page.image]).items():
        torch.testing.assert_close(values.float(), inputs[name].float())


@torch.no_grad()
def test_cells_are_the_features_of_the_page(family, folder):
    """A glyph changes the features of its own cell most."""
    model = family.build_model(seed=1)
    layout = Layout(5, 22)
    blank = np.full((layout.rows * 16, layout.columns * 16, 3), 255, np.uint8)
    images = [Image.fromarray(blank)]
    for row, column in ((0, 0), (2, 13), (4, 21)):
        drawn = blank.copy()
        drawn[row * 16 + 4 : row * 16 + 12, column * 16 + 4 : column * 16 + 12] = 0
        images.append(Image.fromarray(drawn))
    cells = family.cells(family.features(model, family.pixels(images)), layout)
    cells = cells.view(len(images), layout.image_tokens, -1)
    moved = (cells[1:] - cells[:1]).norm(dim=-1).argmax(-1)
    assert moved.tolist() == [0, 2 * 22 + 13, 4 * 22 + 21]


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


def test_the_chat_template_adds_nothing_but_the_image_and_ends_an_answer(family):
    processor = family.build_processor()
    before, after = prompt(processor, "?MAP:").split(IMAGE_PAD)
    assert set(encode(before)) <= {VOCABULARY[UNKNOWN]} or before.startswith("<|")
    assert after.removeprefix("<|vision_end|>") == "?MAP:"
    turns = [{"role": "user", "content": "?MAP:"}, {"role": "assistant", "content": "A1B"}]
    assert processor.apply_chat_template(turns) == "?MAP:A1B<|im_end|>"


@torch.no_grad()
def test_packed_questions_see_exactly_what_a_lone_question_sees(family):
    model, processor = family.build_model(seed=1), family.build_processor()
    packing = Packing(SMALL[family.name], documents=2, tokens=90, onward=1)
    pages = [draw_document(stream(Split.TRAIN, 0, n), packing.layout) for n in range(2)]
    asked = [choose_questions(stream(Split.TRAIN, 1, 0), page, packing) for page in pages]
    batch = pack(family, pages, asked, packing.tokens)
    text = model.model.language_model
    is_image = (batch.input_ids == VOCABULARY[IMAGE_PAD]).unsqueeze(-1)
    seen = family.features(model, batch.pixels)
    positions = batch.position_ids
    hidden = text(
        inputs_embeds=text.embed_tokens(batch.input_ids).masked_scatter(is_image, seen),
        attention_mask=batch.mask,
        position_ids=positions if len(positions) > 1 else positions[0],
        use_cache=False,
    ).last_hidden_state
    prefix, number = len(family.prefix(packing.layout)[0]), 0
    for row, (page, questions) in enumerate(zip(pages, asked, strict=True)):
        for _, question in questions:
            words = prompt(processor, question.prompt) + question.answer
            inputs = processor(text=[words], images=[page.image], return_tensors="pt")
            alone = model.model(**inputs).last_hidden_state[0, prefix:]
            packed = hidden[row, batch.blocks[row] == number][:-1]
            torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
            number += 1
    assert number == len(batch.kinds)


def test_labels_are_the_answers_and_their_end(family):
    packing = Packing(SMALL[family.name], documents=1, tokens=90, onward=1)
    rng = stream(Split.TRAIN, 5, 0)
    assert rng.random() >= packing.pictures
    page = draw_document(rng, packing.layout)
    asked = choose_questions(rng, page, packing)
    check_labels(draw_batch(family, packing, Split.TRAIN, 5, 0), [asked])


def test_pictures_take_their_share_of_the_batches(family):
    packing = Packing(PAGE, documents=2, tokens=320, onward=1, pictures=1.0)
    rng = stream(Split.TRAIN, 5, 0)
    rng.random()
    pictures = draw_pictures(rng, 4)
    batch = draw_batch(family, packing, Split.TRAIN, 5, 0)
    asked = sum(len(picture.questions) for picture in pictures)
    assert 0 < len(batch.kinds) <= asked
    for name, values in family.pixels([picture.image for picture in pictures]).items():
        assert torch.equal(batch.pixels[name], values)


def test_all_kinds_of_pictures_are_learnt_from():
    kinds = {
        kind
        for picture in draw_pictures(stream(Split.TRAIN, 0), 60)
        for kind, _ in picture.questions
    }
    assert kinds == set(Kind) - {Kind.TRANSCRIPT, Kind.ONWARD, Kind.VALUE}


def check_labels(batch, asked):
    characters, number = list(VOCABULARY), 0
    for row, questions in enumerate(asked):
        for _, question in questions:
            labels = batch.labels[row, batch.blocks[row] == number]
            tokens = [characters[label] for label in labels[labels != IGNORED].tolist()]
            assert tokens == [*question.answer, "<|im_end|>"]
            number += 1
    assert number == len(batch.kinds)
    assert bool((batch.labels[batch.blocks < 0] == IGNORED).all())


@torch.no_grad()
def test_lent_language_layers_attend_alike(tmp_path):
    """A KV head that two query heads share is there twice, beside the same queries."""
    lender = FAMILIES["qwen2vl"]()
    given = lender.build_model(seed=2)
    export(lender, given, tmp_path, "# Lender\n")
    model = FAMILIES["llava_next"]().build_model(seed=3)
    own, words = lend(tmp_path, model)
    assert not own
    assert words.shape == (len(VOCABULARY), 128)
    text, source = model.model.language_model, given.model.language_model
    ids = torch.tensor([encode("?KEY:A1B2")])
    assert torch.allclose(text.embed_tokens(ids), source.embed_tokens(ids), atol=1e-2)
    attention, other = text.layers[0].self_attn, source.layers[0].self_attn
    hidden = source.embed_tokens(ids)
    keys = attention.k_proj(hidden).unflatten(-1, (8, -1))
    theirs = torch.nn.functional.linear(hidden, other.k_proj.weight).unflatten(-1, (4, -1))
    assert torch.allclose(keys, theirs.repeat_interleave(2, 2), atol=2e-2)
    same = FAMILIES["qwen2vl"]().build_model(seed=4)
    assert lend(tmp_path, same)[0]
    assert torch.allclose(same.lm_head.weight, given.lm_head.weight, atol=1e-2)
