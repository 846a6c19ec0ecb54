"""Masked heads as settings: what they change, what they are keyed by, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.fixtures import Stock, ask, pages, photo, refused, rows
from torch import Tensor

from sparsemm_eval.engine import runner
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import LlavaSparseMM, Qwen2VLSparseMM
from sparsemm_eval.methods import HeadScores, visual_heads
from sparsemm_eval.tiny import default_checkpoint

MakeQwen = Callable[..., Qwen2VLSparseMM]
MakeLlava = Callable[..., LlavaSparseMM]


def without_queries(stock: Stock, heads: Mapping[int, list[int]]) -> Stock:
    """Stock transformers with a part of its query projections cut out."""
    for layer, silent in heads.items():
        attention = stock.model.model.language_model.layers[layer].self_attn
        attention.q_proj.register_forward_hook(silencer(silent, attention.head_dim))
    return stock


def silencer(silent: list[int], head_dim: int) -> Callable[..., Tensor]:
    def hook(module: torch.nn.Module, given: Any, out: Tensor) -> Tensor:
        heads = out.unflatten(-1, (-1, head_dim)).clone()
        heads[..., silent, :] = 0
        return heads.flatten(-2)

    return hook


def test_masked_qwen2vl_is_stock_without_these_heads(qwen: MakeQwen, reader: Checkpoint) -> None:
    documents = pages(4)
    whole = ask(qwen(batch_size=4), documents)
    model = qwen(batch_size=4, mask_heads="visual:0.1")
    masked = ask(model, documents)
    silent = {layer: model.cell.mask.of_layer(layer) for layer, _ in model.cell.mask.heads}
    stock = without_queries(Stock(reader.folder), silent)
    assert masked == [stock.answer(document) for document in documents]
    assert masked != whole


def test_masked_llava_is_stock_without_these_heads(
    llava_model: MakeLlava, llava: Checkpoint
) -> None:
    documents = [
        {"images": [photo(40 + 9 * n, 40, seed=n)], "question": "what? " * (1 + n)}
        for n in range(3)
    ]
    masked = ask(llava_model(batch_size=3, mask_heads="0-1+2-2+2-3"), documents)
    stock = without_queries(Stock(llava.folder), {0: [1], 2: [2, 3]})
    assert masked == [stock.answer(document) for document in documents]
    assert masked != ask(llava_model(batch_size=3), documents)


def test_equal_heads_are_one_cell_however_they_are_named(
    qwen: MakeQwen, reader: Checkpoint, answers: Path
) -> None:
    best = qwen(mask_heads="visual:0.05").cell.mask.names
    for heads in ("visual:0.05", best, "+".join(reversed(best.split("+")))):
        ask(qwen(mask_heads=heads), pages(1))
    (row,) = rows(answers)
    assert row.record["masked_heads"] == {"heads": best, "mode": "query"}
    assert f"masked(query,{len(best.split('+'))} heads," in row.cell


@pytest.mark.parametrize(
    "changed",
    [
        {"mask_mode": "output"}, {"mask_heads": "2-1"}, {"mask_heads": None},
        {"mask_heads": "2-0+2-1"},
    ],
    ids=str,
)  # fmt: skip
def test_another_mask_is_another_answer(
    qwen: MakeQwen, answers: Path, changed: dict[str, Any]
) -> None:
    first = {"mask_heads": "2-0"}
    ask(qwen(**first), pages(1))
    ask(qwen(**first | changed), pages(1))
    assert len({row.key for row in rows(answers)}) == len(rows(answers)) == 2


def test_a_key_without_a_mask_is_as_it_was(qwen: MakeQwen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers from before there were masks are found again."""
    keyed: list[Mapping[str, Any]] = []
    monkeypatch.setattr(runner, "answer_key", lambda parts: keyed.append(parts) or "key")
    model = qwen(mask_mode="output")
    model.runner.key(model.cell, {"prompt": "p"})
    assert set(keyed[0]) == {
        "version", "model", "checkpoint", "dtype", "family", "method", "settings", "prompt",
    }  # fmt: skip


@pytest.mark.parametrize("heads", ["1-1+2-0", "visual:0.05", "random:0.05:1", "1-1"])
def test_as_the_command_line_gives_it(answers: Path, heads: str) -> None:
    arguments = f"pretrained={default_checkpoint()},method=fullkv,answers={answers}"
    model = Qwen2VLSparseMM.create_from_arg_string(f"{arguments},mask_heads={heads}")
    shape = model.runner.checkpoint.shape
    share = round(0.05 * shape.layers * shape.query_heads)
    assert len(model.cell.mask.heads) == (len(heads.split("+")) if "-" in heads else share)
    if heads.startswith("random"):
        best = visual_heads(model.runner.checkpoint.head_scores(), 0.05)
        assert not set(model.cell.mask.heads) & set(best)


def test_given_scores_decide_who_is_visual(
    qwen: MakeQwen, reader: Checkpoint, tmp_path: Path
) -> None:
    """Although full KV itself reads none."""
    values = torch.zeros(reader.shape.layers, reader.shape.query_heads)
    values[1, 2] = 1
    HeadScores(values.numpy()).write(tmp_path / "scores.json")
    model = qwen(mask_heads="visual:0.01", head_scores=str(tmp_path / "scores.json"))
    assert model.cell.mask.heads == ((1, 2),)


def test_it_goes_with_every_method(qwen: MakeQwen, answers: Path) -> None:
    for method in ("sparsemm", "streaming"):
        settings = {"method": method, "budget": 64, "window": 8, "mask_heads": "visual:0.1"}
        ask(qwen(**settings), pages(1))
    assert [row.record["masked_heads"]["mode"] for row in rows(answers)] == ["query", "query"]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("settings", "words"), [
    ({"mask_heads": "0-99"}, "the model has no head 0-99; its heads are 0-0 to"),
    ({"mask_heads": "2-0+2-0"}, "head 2-0 is given twice"),
    ({"mask_heads": 3}, "mask_heads=3: it must be visual:SHARE"),
    ({"mask_heads": "visual:5"}, "mask_heads='visual:5': it must be visual:SHARE"),
    ({"mask_heads": "random:0.7:1"}, "share of at most 0.5"),
    ({"mask_heads": "2-0", "mask_mode": "key"}, "mask_mode='key': it must be one of query, output"),
    ({"mask_mode": "key"}, "mask_mode='key'"),
])  # fmt: skip
def test_masks_that_cannot_be(settings: dict[str, Any], words: str, answers: Path) -> None:
    assert words in refused(**settings, answers=str(answers))


@pytest.mark.usefixtures("unloaded")
def test_no_scores_to_choose_by(llava: Checkpoint, answers: Path) -> None:
    with pytest.raises(FileNotFoundError, match="sparsemm-eval chase"):
        LlavaSparseMM(checkpoint=llava, method="fullkv", mask_heads="visual:0.1", answers=answers)
