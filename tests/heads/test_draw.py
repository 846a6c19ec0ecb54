"""What heads look at: against stock attention matrices; what is chosen, written and refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.family_checkpoints import build_qwen3
from engine.fixtures import Stock, change_config, film, photo, sentence
from engine.llava_checkpoints import build_llava, build_onevision
from PIL import Image, ImageFile

from sparsemm_eval.engine import checkpoint as checkpoint_module
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.errors import UserError
from sparsemm_eval.families import find_family
from sparsemm_eval.families.qwen2_vl import Qwen2VLRegions
from sparsemm_eval.heads.capture import read_prompts
from sparsemm_eval.heads.draw import (
    ImageAttention,
    attend,
    draw,
    parse_heads,
    rank_heads,
)
from sparsemm_eval.heads.scene import Scene, drawn_scene, read_film, read_scene
from sparsemm_eval.methods import HeadScores, ModelShape, Sensitivity
from sparsemm_eval.methods.sensitivity import RULES, Kind
from sparsemm_eval.tiny import default_checkpoint

SHAPE = ModelShape(layers=3, query_heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def reader() -> Checkpoint:
    return Checkpoint(default_checkpoint(), dtype="float32")


@pytest.fixture
def llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """With random weights and no head scores anywhere."""
    monkeypatch.setattr(checkpoint_module, "cache_folder", lambda: tmp_path / "user-cache")
    return Checkpoint(build_llava("mistral", tmp_path / "llava"), dtype="float32")


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights is an error."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(checkpoint_module.AutoModelForImageTextToText, "from_pretrained", fail)


def check_pictures(files: tuple[Path, ...]) -> None:
    """Each is a picture of column width or more, and shows something."""
    for path in files:
        if path.suffix == ".svg":
            assert "<svg" in path.read_text(encoding="utf-8")
            continue
        with Image.open(path) as image:
            assert 1200 < image.width < 1500, path
            assert 300 < image.height < 3000, path
            assert len(np.unique(np.asarray(image.convert("L")))) > 20, path


def test_all_pictures_of_the_embedded_model(reader: Checkpoint, tmp_path: Path) -> None:
    drawn = draw(reader, drawn_scene(), tmp_path / "new" / "folder", best=2, worst=2)
    names = ["attention.png", "all_heads.png", "regions.png", "scores.png", "scores.svg"]
    names += ["sensitivity.png", "sensitivity.svg"]
    assert [path.name for path in drawn.files] == names
    check_pictures(drawn.files)
    scores = reader.head_scores().values
    best = "-".join(map(str, np.unravel_index(scores.argmax(), scores.shape)))
    assert drawn.lines[0].startswith(f"head {best} · #1 · score {scores.max():.3g}, ")
    assert len(drawn.lines) == 4
    assert all(re.search(r"\d+% on image, \d+% on box$", line) for line in drawn.lines)


def test_llava_shows_base_image_and_tiles(llava: Checkpoint, tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random((3, 4))
    HeadScores(scores).write(tmp_path / "scores.json")
    scene = Scene(photo(57, 40), "Is it $5 or $6?", (5, 5, 20, 20))
    drawn = draw(llava, scene, tmp_path, head_scores=tmp_path / "scores.json", max_new_tokens=4)
    check_pictures(drawn.files)
    assert len(drawn.files) == 5
    assert len(drawn.lines) == 6
    assert all(re.search(r", base \d+%, tile \d+%, newline \d+%$", line) for line in drawn.lines)


@pytest.mark.parametrize(("build", "steps"), [(build_qwen3, 3), (build_onevision, 6)])
def test_a_video_is_drawn_frame_by_frame(build: Callable, steps: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint(build(tmp_path / "model"), dtype="float32")
    path = film(tmp_path / "film.mp4", 12, (64, 48))
    scene = read_film(path, "What is it?", checkpoint.family(frames=6))
    drawn = draw(checkpoint, scene, tmp_path / "out", heads="2-3,0-1", max_new_tokens=4)
    check_pictures(drawn.files)
    assert re.match(r"head 2-3, \d+% on video", drawn.lines[0])
    looks = attend(checkpoint, scene, 4)
    assert looks.regions.steps == steps
    # The first frame lies on the sheet's upper left corner.
    first = looks.regions.tokens((0, 0, 64, 48))
    assert len(first) == len(looks.regions.frame)
    assert (looks.on_box((0, 0, 64, 48)) <= looks.on_image + 1e-6).all()


def test_a_film_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    for family, name, question, words in [
        ("qwen2_vl", "text.mp4", "What?", "text.mp4: [Errno"),
        ("qwen2_vl", "nowhere.mp4", "What?", "nowhere.mp4: [Errno 2] No such file"),
        ("qwen2_vl", "text.mp4", None, "has no question"),
        ("llava_next", "text.mp4", "What?", "of a llava_next model only images and text are read"),
    ]:
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            read_film(tmp_path / name, question, find_family(family)())
        sentence(caught)


def test_named_heads_need_no_scores_and_it_is_said(llava: Checkpoint, tmp_path: Path) -> None:
    scene = Scene(photo(300, 41), "What?")
    drawn = draw(llava, scene, tmp_path, heads="2-3, 0-1", max_new_tokens=4)
    assert [path.name for path in drawn.files] == ["attention.png", "all_heads.png", "regions.png"]
    assert drawn.lines[0].startswith("head 2-3, ")
    assert drawn.lines[1].startswith("head 0-1, ")
    assert drawn.lines[2].startswith("no scores drawn: no head scores for")
    with pytest.raises(FileNotFoundError, match="sparsemm-eval chase --model"):
        draw(llava, scene, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.json: there is no such file"):
        draw(llava, scene, tmp_path, heads="2-3", head_scores=tmp_path / "nowhere.json")


def sensitivity_of(shape: ModelShape) -> Sensitivity:
    """Random losses of two kinds of prompts, one of which loses nothing, and a table."""
    chance = np.random.default_rng(0)
    size = (shape.layers, shape.kv_heads)
    kinds = {"a": Kind(chance.random(size), 2, 9), "b": Kind(np.zeros(size), 2, 4)}
    table = np.full(size, 9)
    table[0] += np.arange(shape.kv_heads) * 2 - shape.kv_heads + 1
    return Sensitivity(shape, 8, kinds, chance.integers(len(RULES), size=size), {9: table})


def test_a_sensitivity_file_is_drawn_where_one_is_given_or_found(
    llava: Checkpoint, tmp_path: Path
) -> None:
    scene = Scene(photo(57, 40), "What?")
    names = ["attention", "all_heads", "regions", "scores", "scores", "sensitivity", "sensitivity"]
    given = tmp_path / "given.json"
    sensitivity_of(llava.shape).write(given)
    for file in (given, tmp_path / "given.json@share+a"):
        drawn = draw(llava, scene, tmp_path / "one", head_scores=file, max_new_tokens=2)
        assert [path.stem for path in drawn.files] == names
        check_pictures(drawn.files)
    assert "sensitivity of each query head" in (tmp_path / "one" / "scores.svg").read_text()
    # Found, and named by its word.
    sensitivity_of(llava.shape).write(llava.folder / "head_scores.sensitivity.json")
    drawn = draw(llava, scene, tmp_path / "two", heads="0-1", max_new_tokens=2)
    assert [path.stem for path in drawn.files] == [*names[:3], *names[5:]]
    drawn = draw(llava, scene, tmp_path / "two", head_scores=Path("sensitivity"), max_new_tokens=2)
    assert [path.stem for path in drawn.files] == names
    HeadScores(np.eye(*llava.head_scores("sensitivity").values.shape)).write(given)
    drawn = draw(llava, scene, tmp_path / "two", head_scores=given, max_new_tokens=2)
    assert [path.stem for path in drawn.files] == names
    assert "visual score of each query head" in (tmp_path / "two" / "scores.svg").read_text()


def test_best_heads_come_first_and_worst_last_from_the_end() -> None:
    values = np.arange(12.0).reshape(3, 4)
    assert rank_heads(HeadScores(values), 2, 1) == [(2, 3), (2, 2), (0, 0)]
    assert rank_heads(HeadScores(values), 0, 2) == [(0, 0), (0, 1)]
    assert len(set(rank_heads(HeadScores(values), 7, 5))) == 12


@pytest.mark.parametrize(("best", "worst"), [(0, 0), (10, 3), (-1, 3)])
def test_numbers_of_heads_that_do_not_fit_are_named(best: int, worst: int) -> None:
    with pytest.raises(ValueError, match=f"best={best}") as caught:
        rank_heads(HeadScores(np.ones((3, 4))), best, worst)
    sentence(caught)


@pytest.mark.parametrize("text", ["3-0", "0-4", "1", "", "1-1,", "a-b", "1--1", "0-0;1-1"])
def test_a_head_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"heads={text!r}")) as caught:
        parse_heads(text, SHAPE)
    sentence(caught)


def test_a_scene_is_read_from_a_file(tmp_path: Path) -> None:
    Image.new("L", (40, 30), 7).save(tmp_path / "grey.png")
    scene = read_scene(tmp_path / "grey.png", "What?", "1,2,3.5,4")
    assert (scene.visual.mode, scene.visual.size) == ("RGB", (40, 30))
    assert (scene.question, scene.box) == ("What?", (1, 2, 3.5, 4))
    assert read_scene(tmp_path / "grey.png", "What?", None).box is None


def test_a_scene_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """Cut-off images too, though importing lmms-eval has PIL fill them up."""
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    (tmp_path / "text.png").write_text("no image")
    whole = tmp_path / "whole.png"
    photo(40, 30).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-60])
    for image, question, box, words in [
        (None, "What?", None, "without its image"),
        (None, None, "1,1,2,2", "without its image"),
        (whole, None, None, "has no question"),
        (whole, " ", None, "has no question"),
        (whole, "What?", "1,2,3", "box='1,2,3': it must be x0,y0,x1,y1"),
        (tmp_path / "nowhere.png", "What?", None, "nowhere.png cannot be read"),
        (tmp_path / "text.png", "What?", None, "text.png cannot be read"),
        (tmp_path / "cut.png", "What?", None, "cut.png cannot be read"),
        (tmp_path, "What?", None, "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            read_scene(image, question, box)
        sentence(caught)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("box", [(0, 0, 65, 48), (9, 9, 9, 20), (0, float("nan"), 5, 5)])
def test_a_box_outside_is_refused_before_weights_load(box: tuple, tmp_path: Path) -> None:
    checkpoint = Checkpoint(default_checkpoint(), dtype="float32")
    scene = Scene(Image.new("RGB", (64, 48)), "What?", box)
    with pytest.raises(ValueError, match="outside its image of 64x48") as caught:
        draw(checkpoint, scene, tmp_path / "out")
    sentence(caught)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unloaded")
def test_a_model_whose_regions_are_unknown_is_refused_before_weights_load(
    llava: Checkpoint, tmp_path: Path
) -> None:
    config = json.loads((llava.folder / "config.json").read_text())
    assert config["model_type"] == "llava_next"
    change_config(llava.folder, model_type="llava")
    with pytest.raises(ValueError, match="model_type=llava: it must be one") as caught:
        draw(Checkpoint(llava.folder), drawn_scene(), tmp_path, heads="0-0")
    sentence(caught)


FAMILIES = ["qwen2_vl", "llama", "mistral", "sliding window", "qwen3_vl", "llava_onevision"]
FILMED = {"qwen3_vl": build_qwen3, "llava_onevision": build_onevision}  # a video is shown to them
TOKENS = 6


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded Qwen2-VL, and LLaVA-NeXT with random weights on several backbones."""
    if request.param == "qwen2_vl":
        return Checkpoint(default_checkpoint(), dtype="float32")
    if request.param in FILMED:
        folder = FILMED[request.param](tmp_path_factory.mktemp("model"))
        return Checkpoint(folder, dtype="float32")
    backbone = "llama" if request.param == "llama" else "mistral"
    folder = build_llava(backbone, tmp_path_factory.mktemp("model"))
    if request.param == "sliding window":
        # Shorter than the prompt: some of the image is out of sight.
        change_config(folder, "text_config", sliding_window=40)
    return Checkpoint(folder, dtype="float32")


def matrix_mean(checkpoint: Checkpoint, scene: Scene) -> tuple[str, np.ndarray]:
    """Greedy answer, and the mean of its rows of all attention matrices, image columns only."""
    stock = Stock(checkpoint.folder)
    stock.model.set_attn_implementation("eager")
    shown = "image"
    if checkpoint.config.model_type in FILMED:
        shown = "video"
        inputs = read_prompts(stock.processor, [scene.visual], [scene.question], checkpoint.family)
    else:
        inputs = stock.inputs({"images": [scene.visual], "question": scene.question})
    ids = stock.model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
    length = inputs["input_ids"].shape[1]
    special = torch.tensor(stock.processor.tokenizer.all_special_ids)
    ends = torch.isin(ids[0, length:], special).nonzero().flatten().tolist()
    new = ids[0, length : length + ends[0]] if ends else ids[0, length:]
    assert len(new) > 1, "choose a scene with a longer answer"
    inputs["input_ids"] = ids[:, : length + len(new)]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(
            inputs["mm_token_type_ids"], (0, len(new))
        )
    with torch.inference_mode():
        attentions = stock.model(**inputs, output_attentions=True).attentions
    image = inputs["input_ids"][0] == getattr(checkpoint.config, f"{shown}_token_id")
    mean = torch.stack(attentions)[:, 0, :, length - 1 : -1][..., image].mean(-2)
    return stock.processor.tokenizer.decode(new).strip(), mean.numpy()


def test_the_weights_are_those_of_eager_attention(checkpoint: Checkpoint, tmp_path: Path) -> None:
    scene = drawn_scene()
    if checkpoint.config.model_type in FILMED:
        path = film(tmp_path / "film.mp4", 12, (64, 48))
        scene = read_film(path, "Is it red?", checkpoint.family(frames=6))
    if checkpoint.config.model_type == "llava_next":
        scene = Scene(photo(57, 40), "Is it red?")
    looks = attend(checkpoint, scene, TOKENS)
    answer, expected = matrix_mean(checkpoint, scene)
    assert looks.answer == answer
    assert looks.weights.shape == expected.shape
    np.testing.assert_allclose(looks.weights, expected, atol=1e-5)


def test_the_heads_of_the_highest_scores_look_at_the_answer() -> None:
    checkpoint = Checkpoint(default_checkpoint(), dtype="float32")
    scene = drawn_scene()
    looks = attend(checkpoint, scene)
    heads = np.array(rank_heads(checkpoint.head_scores(), best=3, worst=10)).T
    on_box = looks.on_box(scene.box)[tuple(heads)]
    assert on_box[:3].min() > 0.5 > 0.1 > on_box[3:].mean()


def test_shares_add_up() -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(13), size=(2, 4))[..., :12]
    looks = ImageAttention("", 1, weights, Qwen2VLRegions(40, 30, "all", 3, 4))
    np.testing.assert_allclose(looks.on_image, looks.on_box((0, 0, 40, 30)))
    np.testing.assert_allclose(looks.on_image, sum(looks.on_parts().values()))
    np.testing.assert_allclose(looks.on_box((1, 1, 12, 9)), weights[..., [0, 1]].sum(-1))


def test_an_empty_answer_is_named(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    end = torch.tensor([[checkpoint.processor.tokenizer.eos_token_id]])
    monkeypatch.setattr(
        checkpoint.model, "generate", lambda input_ids, **_: torch.cat([input_ids, end], 1)
    )
    with pytest.raises(ValueError, match=r"the answer to 'What\?' is empty"):
        attend(checkpoint, Scene(Image.new("RGB", (64, 48)), "What?"))
