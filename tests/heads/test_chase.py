"""Visual scores: against full attention matrices, in batches, resumed, and token by token."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.llava_checkpoints import build_llava
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, BatchFeature

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.families.qwen2_vl import Qwen2VLRegions
from sparsemm_eval.heads import chase as module
from sparsemm_eval.heads.chase import characters_found, chase, score_page
from sparsemm_eval.heads.pages import Chunk, Page, drawn_pages, pages_for
from sparsemm_eval.heads.regions import find_regions
from sparsemm_eval.tiny import default_checkpoint
from sparsemm_eval.tiny.documents import Layout

EMBEDDED = sorted(path.parent for path in default_checkpoint().parent.glob("*/config.json"))
SMALL = Layout(2, 11, 1, 2)
TOKENS = 6  # of a generated answer


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Checkpoints in float64, where near-ties of attention do not flip an argmax."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            folder = default_checkpoint().parent / name
            if name.startswith("random-"):
                folder = tmp_path_factory.mktemp("llava") / name
                build_llava(name.removeprefix("random-"), folder)
            made[name] = Checkpoint(folder, dtype="float32")
            made[name].model.double()
            if name.startswith("random-"):  # else some answers end before they begin
                made[name].model.generation_config.eos_token_id = None
        return made[name]

    return get


NAMES = [*(folder.name for folder in EMBEDDED), "random-llama", "random-mistral"]


@pytest.fixture
def reader(checkpoint_of: Callable[[str], Checkpoint]) -> Checkpoint:
    """The embedded Qwen2-VL."""
    return checkpoint_of(default_checkpoint().name)


def generated(count: int, *layouts: Layout) -> Iterator[Page]:
    """Small drawn pages that the model describes by itself, and may score whatever it says."""
    pages = [drawn_pages(count, known_text=False, layout=layout) for layout in layouts or (SMALL,)]
    flat = (page for group in zip(*pages, strict=True) for page in group)
    return (lettered(page, seed) for seed, page in enumerate(flat))


def lettered(page: Page, seed: int) -> Page:
    """The page with a box for every character there is."""
    rng = np.random.default_rng(seed)
    width, height = page.image.size
    x, y = (np.sort(rng.integers(0, side, (95, 2)), axis=1) for side in (width, height))
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1] + 1, y[:, 1] + 1], 1).tolist()
    return replace(page, chunks=tuple(map(Chunk, map(chr, range(32, 127)), map(tuple, boxes))))


class Oracle:
    """Scores from stock transformers, token by token, with every attention matrix in hand."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model = AutoModelForImageTextToText.from_pretrained(
            checkpoint.folder, dtype=torch.float64, attn_implementation="eager"
        ).eval()
        self.model.generation_config = checkpoint.model.generation_config

    def scores(self, page: Page, new_tokens: int, image_tokens: str) -> np.ndarray:
        """Of what the model generates, step by step."""
        inputs = self.inputs(page)
        start = inputs["input_ids"].shape[1]
        out = self.model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False,
            output_attentions=True, return_dict_in_generate=True,
        )  # fmt: skip
        ends = (self.model.generation_config.eos_token_id, self.model.config.image_token_id)
        boxes = []
        for token in out.sequences[0, start:].tolist():
            if token in ends:
                break
            text = self.checkpoint.processor.tokenizer.decode([token]).strip()
            own = [chunk.box for chunk in page.chunks if text and text in chunk.text]
            boxes.append(own[0] if len(own) == 1 else None)
        rows = [[layer[0, :, -1] for layer in step] for step in out.attentions]
        return self.hits(page, inputs, boxes, rows, image_tokens)

    @torch.inference_mode()
    def known(self, page: Page) -> tuple[np.ndarray, int]:
        """Of the page's own text, one character a token; and how many the model itself says."""
        inputs = self.inputs(page)
        start = inputs["input_ids"].shape[1]
        text = self.checkpoint.processor.tokenizer(page.text, add_special_tokens=False)
        ids = torch.tensor([text["input_ids"]])
        for name, more in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)),
                           ("mm_token_type_ids", torch.zeros_like(ids))):  # fmt: skip
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], more], 1)
        out = self.model(**inputs, output_attentions=True)
        right = out.logits[0, start - 1 : -1].argmax(-1) == ids[0]
        boxes = [c.box if said else None for c, said in zip(page.chunks, right, strict=True)]
        rows = [
            [layer[0, :, start - 1 + step] for layer in out.attentions]
            for step in range(len(boxes))
        ]
        return self.hits(page, inputs, boxes, rows, "all"), sum(box is not None for box in boxes)

    def inputs(self, page: Page) -> BatchFeature:
        processor = self.checkpoint.processor
        content = [{"type": "image"}, {"type": "text", "text": page.prompt}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return processor(
            text=[prompt], images=[page.image], return_tensors="pt",
            add_special_tokens=not prompt.startswith(processor.tokenizer.bos_token),
        ).to(dtype=torch.float64)  # fmt: skip

    def hits(
        self, page: Page, inputs: BatchFeature, boxes: list, rows: list, image_tokens: str
    ) -> np.ndarray:
        """Sum of hits, from the attention rows [Hq, n] of each step and layer."""
        config, processor = self.model.config, self.checkpoint.processor
        regions = find_regions(config, processor, inputs, [page.image.size], image_tokens)[0]
        image = (inputs["input_ids"][0] == config.image_token_id).nonzero().flatten().numpy()
        scores = np.zeros((self.checkpoint.shape.layers, self.checkpoint.shape.query_heads))
        for box, layers in zip(boxes, rows, strict=False):
            if box is not None:
                tokens = image[regions.tokens(box)]
                for layer, weights in enumerate(layers):
                    looked = weights.argmax(-1).numpy()
                    scores[layer] += np.isin(looked, tokens) / max(len(tokens), 1)
        return scores


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_gives_the_scores_of_50_step_by_step_generations(
    name: str, checkpoint_of: Callable[[str], Checkpoint]
) -> None:
    checkpoint = checkpoint_of(name)
    oracle = Oracle(checkpoint)
    # Both families in full; a second backbone less so.
    count = 10 if name == "random-mistral" else 50
    pages = list(generated(count))
    mode = "tiles" if name == "random-mistral" else "all"
    found = chase(checkpoint, pages, batch_size=10, max_new_tokens=TOKENS, image_tokens=mode)
    expected = [oracle.scores(page, TOKENS, mode) for page in pages]
    assert found.tokens > 2 * count
    assert np.count_nonzero(expected) > count
    np.testing.assert_allclose(found.scores, expected, rtol=1e-12)


@pytest.mark.parametrize("folder", EMBEDDED, ids=lambda folder: folder.name)
def test_known_text_gives_the_scores_of_all_attention_matrices(
    folder: Path, checkpoint_of: Callable[[str], Checkpoint]
) -> None:
    checkpoint = checkpoint_of(folder.name)
    oracle = Oracle(checkpoint)
    pages = list(pages_for(checkpoint, "drawn", 2))
    found = chase(checkpoint, pages, batch_size=2)
    expected, said = zip(*map(oracle.known, pages), strict=True)
    assert found.tokens == sum(said) > 50
    np.testing.assert_allclose(found.scores, expected, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_page_scores_as_it_does_alone(
    name: str, checkpoint_of: Callable[[str], Checkpoint]
) -> None:
    pages = list(generated(2, SMALL, Layout(5, 11, 1, 3)))
    pages[2] = replace(pages[2], prompt="a longer prompt")
    alone = chase(checkpoint_of(name), pages, batch_size=1, max_new_tokens=TOKENS)
    together = chase(checkpoint_of(name), pages, batch_size=4, max_new_tokens=TOKENS)
    np.testing.assert_allclose(together.scores, alone.scores, rtol=1e-12)
    assert together.tokens == alone.tokens > 0


def test_known_texts_of_unlike_length_score_in_a_batch_as_alone(reader: Checkpoint) -> None:
    pages = [*drawn_pages(2, layout=SMALL), *drawn_pages(1, layout=Layout(5, 11, 2, 4))]
    alone, together = (chase(reader, pages, batch_size=size) for size in (1, 3))
    np.testing.assert_allclose(together.scores, alone.scores, rtol=1e-12)
    assert (together.tokens, together.accuracy) == (alone.tokens, alone.accuracy)


@pytest.mark.parametrize("folder", EMBEDDED, ids=lambda folder: folder.name)
def test_few_heads_hold_most_of_the_score_that_ships(folder: Path) -> None:
    shipped = Checkpoint(folder)
    made = json.loads((folder / "head_scores.provenance.json").read_text())
    assert made["checkpoint_hash"] == shipped.hash
    mass = np.sort(shipped.head_scores().values.ravel())[::-1]
    assert mass[: len(mass) // 4].sum() > 0.8 * mass.sum()


def test_the_shipped_scores_are_found_again(reader: Checkpoint) -> None:
    fresh = chase(reader, pages_for(reader, "drawn", 4), batch_size=2)
    shipped = reader.head_scores().values.ravel()
    assert np.corrcoef(shipped, fresh.head_scores.values.ravel())[0, 1] > 0.95
    assert fresh.accuracy > 0.5


def white(width: int = 44, height: int = 32) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


def test_a_token_in_two_chunks_belongs_to_none(reader: Checkpoint) -> None:
    page = next(generated(1))
    once = chase(reader, [page], max_new_tokens=TOKENS)
    twice = replace(page, chunks=page.chunks * 2)
    with pytest.raises(ValueError, match="0 could be scored"):
        chase(reader, [twice], max_new_tokens=TOKENS)
    both = chase(reader, [page, twice], max_new_tokens=TOKENS)
    assert both.tokens == once.tokens
    assert both.ambiguous >= once.ambiguous + once.tokens
    assert "stand in several chunks" in both.summary()
    assert not both.scores[1].any()


def test_short_tokens_may_belong_to_no_chunk(reader: Checkpoint) -> None:
    page = replace(next(generated(1)), shortest=2)
    with pytest.raises(ValueError, match="0 could be scored"):
        chase(reader, [page], max_new_tokens=TOKENS)


def test_pages_without_text_are_left_out_and_counted(reader: Checkpoint) -> None:
    page = next(generated(1))
    found = chase(reader, [Page(white(), "x", ()), page], batch_size=2, max_new_tokens=TOKENS)
    assert (len(found.scores), found.left_out) == (1, 1)
    assert "1 images without annotated text left out" in found.summary()


def test_a_killed_chase_goes_on(
    reader: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [*generated(4), Page(white(), "x", ())]
    whole = chase(reader, pages, max_new_tokens=TOKENS)
    path = tmp_path / "s.pages.jsonl"

    def killed() -> Iterator[Page]:
        yield from pages[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chase(reader, killed(), max_new_tokens=TOKENS, records=path)
    # The last line was being written.
    path.write_bytes(path.read_bytes()[:-5])
    computed = []
    score = module._score_annotated

    def counted(checkpoint: Checkpoint, some: list[Page], *more: object) -> list:
        computed.extend(some)
        return score(checkpoint, some, *more)

    monkeypatch.setattr(module, "_score_annotated", counted)
    again = chase(reader, pages, max_new_tokens=TOKENS, records=path)
    assert computed == pages[2:4]
    np.testing.assert_array_equal(again.scores, whole.scores)
    assert (again.tokens, again.accuracy, again.data_hash) == (
        whole.tokens, whole.accuracy, whole.data_hash
    )  # fmt: skip
    computed.clear()
    chase(reader, pages, max_new_tokens=TOKENS, records=path)
    assert computed == []


@pytest.mark.parametrize(("change", "words"), [
    ({"image_tokens": "tiles"}, "another image_tokens: give another --output"),
    ({"max_new_tokens": 5}, "another max_new_tokens"),
    ({"other": True}, "page 0 is not that of this data"),
    ({"broken": True}, "not the pages of a chase"),
])  # fmt: skip
def test_records_of_another_chase_are_refused(
    change: dict, words: str, reader: Checkpoint, tmp_path: Path
) -> None:
    pages = list(generated(2))
    path = tmp_path / "s.pages.jsonl"
    chase(reader, pages, max_new_tokens=TOKENS, records=path)
    if change.pop("broken", False):
        path.write_text(path.read_text().replace('"digest"', '"digest', 1))
    if change.pop("other", False):
        pages = pages[::-1]
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words) as caught:
        chase(reader, pages, **{"max_new_tokens": TOKENS, "records": path} | change)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("settings", "words"), [
    ({"pages": []}, "at least 1 image"),
    ({"pages": [Page(white(), "x", ())]}, "none of the 1 images has annotated text"),
    ({"image_tokens": "base"}, "image_tokens='base'"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
])  # fmt: skip
def test_bad_input_is_refused_before_weights_load(settings: dict, words: str) -> None:
    checkpoint = Checkpoint(default_checkpoint())
    with pytest.raises(ValueError, match=words) as caught:
        chase(checkpoint, **{"pages": []} | settings)
    assert "\n" not in str(caught.value)
    assert "model" not in vars(checkpoint)


def test_a_family_whose_regions_are_unknown_is_refused_before_weights_load() -> None:
    checkpoint = Checkpoint(default_checkpoint())
    checkpoint.config.model_type = "paligemma"
    with pytest.raises(ValueError, match="no family is known for model_type=paligemma"):
        chase(checkpoint, [Page(white(), "x", (Chunk("A", (0, 0, 4, 4)),))])
    assert "model" not in vars(checkpoint)


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **_: bool) -> dict:
        return {"offset_mapping": [(place, place + 1) for place in range(len(text))]}

    def decode(self, tokens: list[int], **_: bool) -> str:
        return "".join(map(chr, tokens))


@pytest.mark.parametrize("aligned", [True, False])
def test_a_look_at_the_place_counts_by_its_tokens(aligned: bool) -> None:
    """A over one of four image tokens, B over two; the image begins at position 5."""
    chunks = (Chunk("A", (0, 0, 10, 10)), Chunk("B", (0, 10, 20, 20)), Chunk("\n", None))
    page = Page(Image.new("RGB", (20, 20)), "", chunks, aligned)
    looked = np.array([[[5, 5, 5], [6, 7, 5]], [[0, 8, 5], [5, 7, 5]]])  # [L, Hq, tokens]
    regions = Qwen2VLRegions(20, 20, "all", 2, 2)
    answer = [ord(chunk.text) for chunk in chunks]
    places = np.arange(5, 9)
    found = score_page(page, answer, Letters(), looked, [True] * 3, regions, places)
    assert found.scores.tolist() == [[1, 0.5], [0.5, 1.5]]
    assert (found.answer_tokens, found.scored) == (3, 2)
    half = score_page(page, answer, Letters(), looked, [True, False, True], regions, places)
    assert half.scores.tolist() == [[1, 0], [0, 1]]
    assert half.scored == 1


LETTERS = st.text("abcdefgh ", min_size=1, max_size=20)


@given(LETTERS, LETTERS, LETTERS)
def test_a_chunk_within_a_text_is_found_whole(before: str, chunk: str, after: str) -> None:
    assert characters_found(chunk, before + chunk + after) == len(chunk)


@given(LETTERS, LETTERS)
def test_no_more_is_found_than_there_is(chunk: str, text: str) -> None:
    assert 0 <= characters_found(chunk, text) <= min(len(chunk), len(text))
    assert characters_found(chunk, "0123456789") == 0


def test_a_misread_letter_costs_itself_only() -> None:
    text = "first line\nthe qu1ck brown fax\nlast line"
    assert characters_found("the quick brown fox", text) == 17
