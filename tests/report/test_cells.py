"""Cells by model, benchmark, method and budget."""

import re

import pytest
from report.scored import cell

from sparsemm_eval.report.cells import Filters, cells_frame


@pytest.fixture
def cells():
    return cells_frame(
        [
            cell("fullkv", None, 0.9),
            cell("sparsemm", 64, 0.8, ratio=0.1),
            cell("sparsemm", 64, 0.7, ratio=0.2),
            cell("snapkv", 32, 0.6, model="large"),
            cell("snapkv", 32, 0.6, task="gqa", benchmark="GQA"),
        ]
    )


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"models": ["LARGE"]}, [3]),
        ({"benchmarks": ["gqa", "DocVQA"], "methods": ["SnapKV"]}, [3, 4]),
        ({"benchmarks": ["docvqa_val"]}, [0, 1, 2, 3]),
        ({"methods": ["sparsemm"]}, [1, 2]),
        ({"methods": ["SparseMM (ratio=0.2)"]}, [2]),
        ({"budgets": [64.0]}, [0, 1, 2]),
        ({"budgets": [64.0, 32.0], "models": ["small"]}, [0, 1, 2, 4]),
    ],
)
def test_what_is_kept(cells, names: dict, kept: list[int]) -> None:
    assert list(Filters(**names).apply(cells).index) == kept


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"models": ["huge"]}, "models=huge: it must be of large, small"),
        ({"benchmarks": ["mme"]}, "benchmarks=mme: it must be of DocVQA, GQA"),
        ({"methods": ["h2o"]}, "methods=h2o: it must be of FullKV, SnapKV"),
        ({"budgets": [16.0]}, "budgets=16: it must be of 32, 64"),
        ({"models": ["large"], "methods": ["sparsemm"]}, "large, sparsemm: no cell is all of it"),
    ],
)
def test_unknown_names_are_one_sentence(cells, names: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Filters(**names).apply(cells)
