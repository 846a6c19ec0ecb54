"""What heads look at while a question is answered: measured, and drawn over image or frames."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
from PIL import Image

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.requests import Visual, to_model
from sparsemm_eval.engine.videos import Video
from sparsemm_eval.errors import UserError, check_int, one_line
from sparsemm_eval.families import Box, Regions
from sparsemm_eval.heads.capture import WeightCapture, feed, greedy_answers, read_prompts
from sparsemm_eval.heads.maps import (
    chosen_heads,
    contact_sheet,
    density,
    score_maps,
    token_regions,
)
from sparsemm_eval.heads.regions import find_regions, image_positions, regions_of
from sparsemm_eval.heads.scene import Scene
from sparsemm_eval.heads.sensitivity_maps import sensitivity_maps
from sparsemm_eval.methods import HeadScores, ModelShape, Sensitivity
from sparsemm_eval.report.names import last_part

Head = tuple[int, int]

_OVERLAY, _SHEET = 512, 2048  # longest edge of an overlay and width of the sheet, in pixels


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """Where all heads looked while the answer was written.

    Parameters
    ----------
    answer : str
        What the model wrote.
    tokens : int
        How many tokens it has, over which the weights are averaged.
    weights : ndarray
        [L, Hq, image tokens] float32; what is missing to 1 fell on tokens of text.
    regions : Regions
        Where the image's tokens lie on it.
    """

    answer: str
    tokens: int
    weights: np.ndarray
    regions: Regions

    @property
    def on_image(self) -> np.ndarray:
        """[L, Hq]: share of a head's attention that falls on the image."""
        return self.weights.sum(-1)

    def on_box(self, box: Box) -> np.ndarray:
        """[L, Hq]: share of a head's attention on tokens whose region overlaps a box."""
        return self.weights[..., self.regions.tokens(box)].sum(-1)

    def on_parts(self) -> dict[str, np.ndarray]:
        """[L, Hq] for each kind of image token there is: base, tile, newline."""
        parts = self.regions.parts
        return {part: self.weights[..., parts == part].sum(-1) for part in dict.fromkeys(parts)}


@dataclass(frozen=True)
class Drawn:
    """What a drawing says and wrote.

    Parameters
    ----------
    answer : str
        What the model wrote.
    lines : tuple of str
        One a drawn head: its score and where its attention falls.
    files : tuple of Path
        What was written.
    """

    answer: str
    lines: tuple[str, ...]
    files: tuple[Path, ...]


def parse_heads(text: str, shape: ModelShape) -> list[Head]:
    """Heads named one by one, such as "3-1,4-0": layer and query head of each.

    Raises
    ------
    UserError
        If a name is none, or no head of the model.
    """
    heads = []
    for part in text.split(","):
        layer, dash, head = part.strip().partition("-")
        if not (dash and layer.isdecimal() and head.isdecimal()):
            raise UserError(f"heads={text!r}: {part!r} is no layer-head, such as 3-1,4-0")
        if int(layer) >= shape.layers or int(head) >= shape.query_heads:
            raise UserError(
                f"heads={text!r}: the model has no head {part.strip()}; it has 0-0 to "
                f"{shape.layers - 1}-{shape.query_heads - 1}"
            )
        heads.append((int(layer), int(head)))
    return heads


def rank_heads(scores: HeadScores, best: int, worst: int) -> list[Head]:
    """Heads of the highest scores, from the first on, and of the lowest, from the last on.

    Raises
    ------
    UserError
        If that is no head, or more than there are.
    """
    check_int("best", best, least=0)
    check_int("worst", worst, least=0)
    count = scores.values.size
    if not 0 < best + worst <= count:
        raise UserError(
            f"best={best} and worst={worst} are {best + worst} heads: choose 1 to {count} in all, "
            "as many as the model has"
        )
    order = np.argsort(-scores.values, axis=None, kind="stable")
    chosen = [*order[:best], *order[count - worst :][::-1]]
    return [divmod(int(head), scores.values.shape[1]) for head in chosen]


def attend(checkpoint: Checkpoint, scene: Scene, max_new_tokens: int = 64) -> ImageAttention:
    """Answer a scene's question greedily, and look at the attention that wrote the answer.

    Parameters
    ----------
    checkpoint : Checkpoint
        A model of a family whose regions are known.
    scene : Scene
        What is asked.
    max_new_tokens : int
        Where the answer ends at the latest.

    Raises
    ------
    UserError
        If the family is unknown or the box lies outside the image (both before the weights are
        loaded), or if the answer is empty.
    """
    check_int("max_new_tokens", max_new_tokens, least=1)
    shown = shown_of(scene)
    regions_of(checkpoint.config.model_type, shown)
    asked = [scene.visual], [scene.question]
    processor = checkpoint.family().configure(checkpoint.processor)
    inputs = read_prompts(processor, *asked, checkpoint.family)
    sizes = [scene.visual.size]
    regions = find_regions(checkpoint.config, processor, inputs, sizes, shown=shown)
    positions = image_positions(checkpoint.config, inputs["input_ids"][0], regions)[0]
    if scene.box is not None:
        regions[0].tokens(scene.box)  # raises for a box that is empty or outside
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    inputs = to_model(inputs, model)
    (tokens,) = greedy_answers(checkpoint, inputs, max_new_tokens)
    special = set(tokenizer.all_special_ids)
    answer = list(takewhile(lambda token: token not in special, tokens))
    if not answer:
        raise UserError(
            f"the answer to {scene.question!r} is empty: no token of it has attention to draw; "
            "ask another question"
        )
    capture = WeightCapture(checkpoint.shape, len(answer), positions)
    feed(checkpoint, inputs, [answer], capture)
    weights = capture.weights()[0].float().numpy()
    return ImageAttention(tokenizer.decode(answer).strip(), len(answer), weights, regions[0])


def draw(
    checkpoint: Checkpoint,
    scene: Scene,
    out: Path,
    heads: str | None = None,
    best: int = 3,
    worst: int = 3,
    head_scores: Path | None = None,
    max_new_tokens: int = 64,
) -> Drawn:
    """Answer a question, and draw where the heads looked.

    Parameters
    ----------
    checkpoint : Checkpoint
        A model of a family whose regions are known.
    scene : Scene
        What is asked.
    out : Path
        Folder of the pictures: attention.png (chosen heads over the image), all_heads.png,
        regions.png, scores.png and scores.svg; where the checkpoint has a sensitivity file, or one
        is given, sensitivity.png and sensitivity.svg.
    heads : str, optional
        Those laid over the image, as `parse_heads` reads them; else the best and worst.
    best, worst : int
        How many of the highest and of the lowest score.
    head_scores : Path, optional
        As for `Checkpoint.head_scores`; default: the checkpoint's own visual ones. Where heads are
        named and there is none, no scores are drawn, and a line says so.
    max_new_tokens : int
        Where the answer ends at the latest.

    Raises
    ------
    UserError, FileNotFoundError
        Before the weights are loaded, for all that does not fit; after, if the answer is empty.
    """
    regions_of(checkpoint.config.model_type, shown_of(scene))
    named = None if heads is None else parse_heads(heads, checkpoint.shape)
    notes = []
    given = checkpoint.sensitivity_of(head_scores)
    sensitivity, mixture = given or (_own_sensitivity(checkpoint), "root")
    try:
        scores = checkpoint.head_scores(head_scores)
    except FileNotFoundError as error:
        if named is None or head_scores is not None:
            raise
        scores = None
        notes.append(f"no scores drawn: {one_line(error)}")
    chosen = named or rank_heads(scores, best, worst)
    looks = attend(checkpoint, scene, max_new_tokens)
    name = last_part(checkpoint.pretrained)
    out.mkdir(parents=True, exist_ok=True)
    captions = [_caption(head, looks, scores, scene.box) for head in chosen]
    files = _draw_attention(name, scene, looks, chosen, captions, out)
    if scores is not None:
        files += [out / "scores.png", out / "scores.svg"]
        word = "visual score" if given is None else "sensitivity"
        title = f"{name}: {concentration(scores, word)}"
        title += "" if given is None else f"\nmixture: {mixture}"
        kv_scores = scores.per_kv_head(checkpoint.shape.kv_heads)
        for path in files[-2:]:
            score_maps(scores.values, kv_scores, title, path, word)
    if sensitivity is not None:
        files += [out / "sensitivity.png", out / "sensitivity.svg"]
        title = f"{name}: what each kind of prompts loses where a KV head alone sees only the "
        title += f"newest {sensitivity.window} tokens"
        for path in files[-2:]:
            sensitivity_maps(sensitivity, title, path, mixture)
    lines = [caption.replace("\n", ", ") for caption in captions]
    return Drawn(looks.answer, (*lines, *notes), tuple(files))


def shown_of(scene: Scene) -> str:
    """What a scene shows, in a word."""
    return "video" if isinstance(scene.visual, Video) else "image"


def _picture(visual: Visual, regions: Regions) -> Image.Image:
    """The image, or the sheet of a video's frames on which its tokens lie."""
    if not isinstance(visual, Video):
        return visual
    sheet = Image.new("RGB", (regions.width, regions.height), "white")
    of_steps = visual.frames[:: len(visual.frames) // regions.steps]
    for frame, corner in zip(of_steps, regions.corners, strict=True):
        sheet.paste(Image.fromarray(frame), tuple(corner.tolist()))
    return sheet


def _own_sensitivity(checkpoint: Checkpoint) -> Sensitivity | None:
    with suppress(FileNotFoundError):
        return checkpoint.sensitivity()
    return None


def _draw_attention(
    name: str,
    scene: Scene,
    looks: ImageAttention,
    heads: Sequence[Head],
    captions: Sequence[str],
    out: Path,
) -> list[Path]:
    files = [out / "attention.png", out / "all_heads.png", out / "regions.png"]
    regions = looks.regions
    asked = f"{name}, asked “{_plain(scene.question)}”, answers “{_plain(looks.answer)}”"
    how = f"mean of {looks.tokens} answer token{'s' if looks.tokens > 1 else ''}"
    how += "; base image and tiles summed" if "base" in regions.parts else ""
    how += "" if scene.box is None else "; answer's box outlined"
    if isinstance(scene.visual, Video):
        how += f"; {regions.steps} of the {len(scene.visual.frames)} frames it was shown"
    grey = np.asarray(_picture(scene.visual, regions).convert("L"))

    maps = _maps(looks.weights[tuple(np.array(heads).T)], regions, _OVERLAY)
    chosen_heads(grey, maps, captions, f"{asked}\nAttention, {how}", scene.box, files[0])

    maps = _maps(looks.weights, regions, max(32, min(256, _SHEET // looks.weights.shape[1])))
    box = None
    if scene.box is not None:
        box = tuple(scene.box * _zoom(regions, maps.shape[-1], maps.shape[-2]))
    title = f"{asked}\nAttention of all heads (square-root scale), {how}"
    contact_sheet(maps, title, box, files[1])

    title = f"{name}: the {regions.shown}'s {regions.count} tokens"
    token_regions(grey, regions, title, scene.box, files[2])
    return files


def _maps(weights: np.ndarray, regions: Regions, edge: int) -> np.ndarray:
    """Weights [..., tokens] as maps of the image whose longest edge is `edge` pixels."""
    scale = edge / max(regions.width, regions.height)
    width, height = (max(1, round(side * scale)) for side in (regions.width, regions.height))
    return density(weights, regions.boxes * _zoom(regions, width, height), width, height)


def _zoom(regions: Regions, width: int, height: int) -> np.ndarray:
    """What a box is multiplied by, from the image to a map."""
    return np.array([width / regions.width, height / regions.height] * 2)


def _caption(head: Head, looks: ImageAttention, scores: HeadScores | None, box: Box | None) -> str:
    words = f"head {head[0]}-{head[1]}"
    if scores is not None:
        rank = 1 + int((scores.values > scores.values[head]).sum())
        words += f" · #{rank} · score {scores.values[head]:.3g}"
    words += f"\n{looks.on_image[head]:.0%} on {looks.regions.shown}"
    if box is not None:
        words += f", {looks.on_box(box)[head]:.0%} on box"
    parts = looks.on_parts()
    if len(parts) > 1:
        words += "\n" + ", ".join(f"{part} {share[head]:.0%}" for part, share in parts.items())
    return words


def concentration(scores: HeadScores, word: str = "visual score") -> str:
    """How few heads hold most of the score, which is called by a word."""
    held = np.cumsum(np.sort(scores.values, axis=None)[::-1]) / scores.values.sum()
    few = [str(1 + int((held < share - 1e-9).sum())) for share in (0.5, 0.8, 0.95)]
    return f"{', '.join(few)} of {held.size} query heads hold 50, 80, 95% of the {word}"


def _plain(text: str) -> str:
    return " ".join(text.split())
