"""Which image tokens a box lies on: asked of processors and models themselves.

A box is painted white on black, and the visual features that change are the tokens it lies on. The
towers' attention is silenced, so that a feature knows its own pixels and nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from engine.family_checkpoints import (
    TILE,
    build_idefics3,
    build_smolvlm,
    gemma3_model,
    gemma3_processor,
    internvl_model,
    internvl_processor,
    qwen3_model,
    qwen25_model,
)
from engine.llava_checkpoints import PATCH, SIDE, build_llava, build_onevision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessor,
    GotOcr2ImageProcessorPil,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextImageProcessorPil,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
    Qwen3VLVideoProcessor,
)

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.families import Box, Regions, SheetRegions, family_of
from sparsemm_eval.families.internvl import TileRegions
from sparsemm_eval.families.llava_next import LlavaNextRegions
from sparsemm_eval.families.llava_onevision import LlavaOnevisionRegions
from sparsemm_eval.families.qwen2_vl import Qwen2VLRegions
from sparsemm_eval.families.smolvlm import Idefics3Regions
from sparsemm_eval.heads.regions import find_regions, image_positions
from sparsemm_eval.tiny.training.qwen2_vl import build_config, build_model, build_processor

FAMILIES = (
    "llava_next",
    "llava_next-pil",
    "llava_next-odd",
    "llava_onevision",
    "llava_onevision-pil",
    "llava_onevision-shrunk",
    "qwen2_vl",
    "qwen2_vl-pil",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "internvl-pil",
    "internvl-odd",
    "idefics3",
    "idefics3-large",
    "smolvlm",
    "gemma3",
    "gemma3-pil",
)
# Wide, tall and large canvases; 1 x 1 is one that holds the image in a single tile.
CANVASES = [[SIDE * rows, SIDE * columns] for rows, columns in
            ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model that sees without attention, and its processor."""

    model: PreTrainedModel
    processor: ProcessorMixin

    def read(self, *images: Image.Image, prompts: int = 1) -> dict[str, torch.Tensor]:
        token = self.processor.image_token
        share = len(images) // prompts
        of_prompts = [images[row * share : (row + 1) * share] for row in range(prompts)]
        return self.processor(
            text=[token * share + "x" * row for row in range(prompts)],
            images=family_of(self.model.config).arrange_images(of_prompts),
            padding=True, return_tensors="pt",
        )  # fmt: skip

    @torch.inference_mode()
    def features(self, *images: Image.Image) -> list[torch.Tensor]:
        """[tokens, channels] of each image."""
        if self.model.config.model_type in ("idefics3", "smolvlm"):
            return self._of_samples(*images)
        names = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")
        inputs = {name: x for name, x in self.read(*images).items() if name in names}
        features = self.model.get_image_features(**inputs).pooler_output
        if self.model.config.model_type == "internvl":  # of all tiles, [tiles, tokens, channels]
            how = {"crop_to_patches": True}
            count = self.processor.image_processor.get_number_of_image_patches
            tiles = [count(image.height, image.width, how) for image in images]
            features = [of_image.flatten(0, 1) for of_image in features.split(tiles)]
        return list(features)

    def _of_samples(self, *images: Image.Image) -> list[torch.Tensor]:
        """Of a model that has one list a prompt."""
        inputs = self.read(*images)
        names = ("pixel_values", "pixel_attention_mask")
        given = {name: inputs[name] for name in names}
        features = self.model.get_image_features(**given).pooler_output
        # transformers 5.17 gives [tiles, tokens, channels], 5.24 a list of one prompt's tokens.
        features = features.flatten(0, 1) if torch.is_tensor(features) else features[0]
        cut = self.processor.image_processor([list(images)], return_row_col_info=True)
        tiles = [
            rows * columns + 1
            for rows, columns in zip(*(cut[x][0] for x in ("rows", "cols")), strict=True)
        ]
        return list(features.split([9 * count for count in tiles]))

    @torch.inference_mode()
    def of_video(self, frames: np.ndarray) -> tuple[SheetRegions, torch.Tensor]:
        """Where a video's tokens lie on the sheet of its frames, and their features."""
        read = self.processor.video_processor([frames], do_sample_frames=False, return_tensors="pt")
        sizes = [(frames.shape[2], frames.shape[1])]
        given = self.model.config, self.processor, read, sizes
        (regions,) = find_regions(*given, shown="video")
        # By place: transformers 5.17 calls them otherwise.
        values = [read[name] for name in ("pixel_values_videos", "video_grid_thw") if name in read]
        (features,) = self.model.get_video_features(*values).pooler_output
        if (lacking := regions.count - len(features)) == getattr(regions, "newlines", None):
            # transformers 5.17 adds OneVision's newline later.
            features = torch.nn.functional.pad(features, (0, 0, 0, lacking))
        return regions, features

    def regions(self, *images: Image.Image, image_tokens: str = "all") -> list[Regions]:
        sizes = [image.size for image in images]
        inputs = self.read(*images)
        return find_regions(self.model.config, self.processor, inputs, sizes, image_tokens)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    made: dict[str, Family] = {}

    def get(name: str) -> Family:
        if name not in made:
            made[name] = MAKE[name.split("-")[0]](name, tmp_path_factory)
            assert made[name].model.config.model_type == name.split("-")[0]
            _silence(made[name].model)
        return made[name]

    return get


def _llava(name: str, factory: pytest.TempPathFactory) -> Family:
    checkpoint = Checkpoint(build_llava("llama", factory.mktemp("llava")), dtype="float32")
    processor = checkpoint.processor
    kind = LlavaNextImageProcessorPil if name.endswith("pil") else LlavaNextImageProcessor
    processor.image_processor = kind(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=CANVASES,
    )
    config = checkpoint.config
    config.image_grid_pinpoints = CANVASES
    if name.endswith("odd"):  # patches that leave two pixels of a tile unseen
        config.vision_config.patch_size = processor.patch_size = 10
    return Family(LlavaNextForConditionalGeneration(config).eval(), processor)


def _onevision(name: str, factory: pytest.TempPathFactory) -> Family:
    checkpoint = Checkpoint(build_onevision(factory.mktemp("onevision")), dtype="float32")
    processor, config = checkpoint.processor, checkpoint.config
    pil = name.endswith("pil")
    kind = LlavaOnevisionImageProcessorPil if pil else LlavaOnevisionImageProcessor
    side = {"height": SIDE, "width": SIDE}
    processor.image_processor = kind(size=side, image_grid_pinpoints=CANVASES)
    config.image_grid_pinpoints = CANVASES
    if name.endswith("shrunk"):  # canvases of three tiles and four are scaled down
        config.vision_aspect_ratio = processor.vision_aspect_ratio = "anyres_max_2"
    return Family(LlavaOnevisionForConditionalGeneration(config).eval(), processor)


def _qwen(name: str, _: object) -> Family:
    processor = build_processor()
    draw = {"qwen2_5_vl": qwen25_model, "qwen3_vl": qwen3_model}
    model = draw.get(name, build_model)()
    kind = Qwen2VLImageProcessorPil if name.endswith("pil") else Qwen2VLImageProcessor
    # Small bounds: images are scaled up, left as they are, and scaled down.
    size = {"shortest_edge": 48**2, "longest_edge": 80**2}
    processor.image_processor = kind(patch_size=PATCH, merge_size=2, size=size)
    of_video = Qwen3VLVideoProcessor if name == "qwen3_vl" else Qwen2VLVideoProcessor
    if name == "qwen3_vl":  # of all frames together
        size = {edge: 4 * area for edge, area in size.items()}
    processor.video_processor = of_video(patch_size=PATCH, merge_size=2, size=size)
    return Family(model.eval(), processor)


def _internvl(name: str, _: object) -> Family:
    kind = GotOcr2ImageProcessorPil if name.endswith("pil") else GotOcr2ImageProcessor
    processor = internvl_processor()
    tile = 52 if name.endswith("odd") else TILE  # patches that leave four pixels of a tile unseen
    processor.image_processor = kind(size={"height": tile, "width": tile}, max_patches=6)
    return Family(internvl_model(tile=tile), processor)


def _idefics3(name: str, factory: pytest.TempPathFactory) -> Family:
    build = build_idefics3
    if name == "smolvlm":
        build = build_smolvlm
    checkpoint = Checkpoint(build(factory.mktemp(name)), dtype="float32")
    if name.endswith("large"):  # no whole number of tiles
        checkpoint.processor.image_processor.size = {"longest_edge": 130}
    return Family(type(checkpoint.model)(checkpoint.config).eval(), checkpoint.processor)


def _gemma3(name: str, _: object) -> Family:
    processor = gemma3_processor()
    if name.endswith("pil"):
        side = {"height": TILE, "width": TILE}
        processor.image_processor = Gemma3ImageProcessorPil(size=side)
    return Family(gemma3_model(), processor)


MAKE = {
    "llava_next": _llava,
    "llava_onevision": _onevision,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "gemma3": _gemma3,
}


def _silence(model: PreTrainedModel) -> None:
    names = ("visual", "vision_tower", "vision_model")
    (tower,) = (getattr(model.model, name) for name in names if hasattr(model.model, name))
    ends = ("attn.proj", "self_attn.out_proj", "attention.projection_layer")
    outputs = [module for name, module in tower.named_modules() if name.endswith(ends)]
    assert outputs
    for module in outputs:
        torch.nn.init.zeros_(module.weight)


@st.composite
def images_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    width, height = draw(st.integers(8, 130)), draw(st.integers(8, 130))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    x1, y1 = draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))
    return (width, height), (x0, y0, x1, y1)


def black(size: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> Image.Image:
    image = Image.new("RGB", size)
    if box is not None:
        image.paste((255, 255, 255), box)
    return image


def changed(
    family: Family, size: tuple[int, int], box: tuple, beside: Sequence[Image.Image] = ()
) -> np.ndarray:
    """[count]: whether painting the box changes a token's feature, of the first image or only."""
    before, *others = family.features(black(size), *beside)
    after, *same = family.features(black(size, box), *beside)
    for one, other in zip(others, same, strict=True):
        assert torch.equal(one, other)
    return (before != after).any(-1).numpy()


def moved(box: Box, by: tuple[float, float], size: tuple[int, int]) -> Box | None:
    """The box with its sides moved outward, or inward; None if nothing is left of it."""
    x0, y0 = max(box[0] - by[0], 0), max(box[1] - by[1], 0)
    x1, y1 = min(box[2] + by[0], size[0]), min(box[3] + by[1], size[1])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def pixel_sizes(regions: Regions, size: tuple[int, int]) -> dict[str, tuple[float, float]]:
    """Pixels of the image, along x and y, that one pixel of a part's resized image stands for."""
    width, height = size
    if isinstance(regions, Qwen2VLRegions):
        side = 2 * PATCH
        return {"tile": (width / regions.columns / side, height / regions.rows / side)}
    if isinstance(regions, LlavaOnevisionRegions) and not regions.alone:
        return {"tile": (max(size) / SIDE, max(size) / SIDE)}
    if isinstance(regions, TileRegions):
        side = regions.tile
        tile = (width / regions.columns / side, height / regions.rows / side)
        return {"tile": tile, "base": (width / side, height / side)}
    # Any whole patch tells: those at the margin may be cut.
    tiles = regions.boxes[regions.parts == "tile"]
    scale = max((tiles[:, 2:] - tiles[:, :2]).max(), 1e-9) / regions.patch if len(tiles) else 1
    return {"base": (width / SIDE, height / SIDE), "tile": (scale, scale)}


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(case=images_and_boxes(), two=st.booleans())
def test_painting_a_box_changes_the_features_of_its_tokens(
    name: str, case: tuple, two: bool, family: Callable[[str], Family]
) -> None:
    size, box = case
    beside = [black((50, 40))] if two else []
    try:
        regions = family(name).regions(black(size), *beside)[0]
    except ValueError as error:  # Qwen2-VL's own processor refuses very long images
        assume("aspect ratio" not in str(error))
        raise
    features = changed(family(name), size, box, beside)
    assert regions.count == len(features)
    assert not features[regions.parts == "newline"].any()
    for part, pixel in pixel_sizes(regions, size).items():
        # What lies beside the image is reached by resampling, and by no box.
        own = np.flatnonzero((regions.parts == part) & ~np.isnan(regions.boxes).any(1))
        seen = np.intersect1d(np.flatnonzero(features), own)
        # A pixel of the resized image that is centred within the box cannot stay as it was.
        inner = moved(box, (-pixel[0], -pixel[1]), size)
        if inner is not None:
            assert set(np.intersect1d(regions.tokens(inner), own)) <= set(seen)
        # Bicubic resampling reaches two pixels far, of the coarser of the two images.
        reach = tuple(2.01 * max(1, one) + one for one in pixel)
        if isinstance(regions, Idefics3Regions):  # three pixels far, up to three times
            reach = tuple(3.01 * 3 * max(1, one) + one for one in pixel)
        assert set(seen) <= set(regions.tokens(moved(box, reach, size)))


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@settings(max_examples=40, deadline=None)
@given(case=images_and_boxes(), count=st.sampled_from([2, 4, 6]), data=st.data())
def test_painting_a_box_on_a_frame_changes_the_features_of_its_tokens(
    name: str, case: tuple, count: int, data: st.DataObject, family: Callable[[str], Family]
) -> None:
    size, box = case
    number = data.draw(st.integers(0, count - 1))
    film = np.zeros((count, size[1], size[0], 3), np.uint8)
    try:
        regions, before = family(name).of_video(film)
    except ValueError as error:  # as of images
        assume("aspect ratio" not in str(error))
        raise
    film[number, box[1] : box[3], box[0] : box[2]] = 255
    features = (before != family(name).of_video(film)[1]).any(-1).numpy()
    assert len(features) == regions.count == len(regions.boxes) == len(regions.parts)
    assert not features[regions.parts == "newline"].any()
    assert regions.steps == (count if name == "llava_onevision" else count // 2)
    corner = regions.corners[number * regions.steps // count]
    pixel = [side / SIDE for side in size]
    if name != "llava_onevision":
        cells = regions.frame[0, 2:] - regions.frame[0, :2]
        pixel = (cells / (2 * PATCH)).tolist()

    def tokens(by: tuple[float, ...]) -> set[int]:
        """Those of the box on its frame, its sides moved."""
        one = moved(box, by, size)
        return set() if one is None else set(regions.tokens((*one[:2] + corner, *one[2:] + corner)))

    seen = set(np.flatnonzero(features))
    assert tokens((-pixel[0], -pixel[1])) <= seen
    assert seen <= tokens(tuple(2.01 * max(1, one) + one for one in pixel))


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_an_image_that_is_not_resized_has_sharp_edges(
    name: str, data: st.DataObject, family: Callable[[str], Family]
) -> None:
    if name.startswith("llava"):
        rows, columns = data.draw(st.sampled_from(CANVASES))
        size = (columns, rows)
    elif name.startswith("internvl"):
        tile = 52 if name.endswith("odd") else TILE
        columns, rows = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 3), (1, 6)]))
        size = (columns * tile, rows * tile)
    elif name.startswith("gemma3"):
        size = (TILE, TILE)
    elif name in ("idefics3", "smolvlm"):
        columns, rows = data.draw(st.sampled_from([(2, 2), (2, 1), (1, 2)]))
        size = (columns * TILE, rows * TILE)
    elif name.startswith("idefics3"):
        pytest.skip("all images are resized")
    else:
        size = (data.draw(st.integers(3, 5)) * 16, data.draw(st.integers(3, 5)) * 16)
    x0, y0 = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
    box = (x0, y0, data.draw(st.integers(x0 + 1, size[0])), data.draw(st.integers(y0 + 1, size[1])))
    (regions,) = family(name).regions(black(size), image_tokens="tiles")
    features = changed(family(name), size, box) & (regions.parts == "tile")
    assert regions.tokens(box).tolist() == np.flatnonzero(features).tolist()


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(16, 130), st.integers(16, 130)), min_size=4, max_size=4)
)
def test_every_image_of_a_padded_batch_has_its_own_tokens(
    name: str, sizes: list[tuple[int, int]], family: Callable[[str], Family]
) -> None:
    one = family(name)
    images = [black(size, (0, 0, *size)) for size in sizes]
    inputs = one.read(*images, prompts=2)
    regions = find_regions(one.model.config, one.processor, inputs, sizes)
    assert [r.count for r in regions] == [len(f) for f in one.features(*images)]
    for row, own in zip(inputs["input_ids"], (regions[:2], regions[2:]), strict=True):
        positions = image_positions(one.model.config, row, own)
        assert [len(p) for p in positions] == [r.count for r in own]
        assert (row[np.concatenate(positions)] == one.model.config.image_token_id).all()
        assert len(np.concatenate(positions)) == (row == one.model.config.image_token_id).sum()


@settings(max_examples=30, deadline=None)
@given(case=images_and_boxes())
def test_tiles_only_are_the_tokens_beyond_the_base_image(case: tuple) -> None:
    size, box = case
    canvases = tuple(map(tuple, CANVASES))
    both = LlavaNextRegions(*size, "all", SIDE, PATCH, canvases)
    tiles = LlavaNextRegions(*size, "tiles", SIDE, PATCH, canvases)
    base = (SIDE // PATCH) ** 2
    assert tiles.tokens(box).tolist() == [token for token in both.tokens(box) if token >= base]
    assert (both.tokens(box) < base).any()
    assert np.isnan(both.boxes[both.parts == "newline"]).all()


def test_the_boxes_of_tokens_cover_the_image_once_for_base_and_once_for_tiles() -> None:
    regions = LlavaNextRegions(672, 500, "all", 336, 14, ((672, 672), (336, 672)))
    areas = np.diff(regions.boxes.reshape(-1, 2, 2), axis=1).prod(-1).ravel()
    assert areas[regions.parts == "base"].sum() == pytest.approx(672 * 500)
    # 500 rows of pixels are 35.7 patches: the model keeps 36 of the canvas' 48.
    assert (regions.parts == "newline").sum() == 36
    assert areas[regions.parts == "tile"].sum() == pytest.approx(672 * 500)


def test_a_paper_sized_image_has_as_many_tokens_as_llava_says() -> None:
    """336-pixel tiles of 24 x 24: 576 of base, then 24 rows of 48 and a newline each."""
    canvases = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert LlavaNextRegions(672, 336, "all", 336, 14, canvases).count == 576 + 24 * 49


@pytest.mark.parametrize("box", [(0, 0, 0, 4), (-1, 0, 4, 4), (0, 0, 33, 4), (4, 4, 2, 8),
                                 (float("nan"), 0, 4, 4)])  # fmt: skip
def test_a_box_that_is_empty_or_outside_is_named(box: tuple) -> None:
    with pytest.raises(ValueError, match="outside its image of 32x32"):
        Qwen2VLRegions(32, 32, "all", 2, 2).tokens(box)


def test_an_unknown_family_is_named_with_those_that_are_known() -> None:
    class Other(PreTrainedConfig):
        model_type = "other_vl"

    with pytest.raises(ValueError, match="model_type=other_vl: it must be one of gemma3, idefics3"):
        find_regions(Other(), None, {}, [(8, 8)])


def test_image_tokens_is_one_of_two_words() -> None:
    with pytest.raises(ValueError, match="image_tokens='base': it must be one of all, tiles"):
        find_regions(build_config(), None, {}, [(8, 8)], "base")


def test_a_prompt_that_does_not_fit_its_images_is_refused() -> None:
    config = build_config()
    row = torch.tensor([config.image_token_id] * 3 + [0])
    with pytest.raises(ValueError, match="3 image tokens and its images 4"):
        image_positions(config, row, [Qwen2VLRegions(32, 32, "all", 2, 2)])
