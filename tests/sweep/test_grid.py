"""Grids: what they hold, what they refuse, and that the shipped ones are the paper's."""

from __future__ import annotations

import inspect
import re
import string
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import hostile, spoilt
from hypothesis import given, settings
from hypothesis import strategies as st
from lmms_eval.tasks import TaskManager

from sparsemm_eval.engine.cell import model_settings
from sparsemm_eval.engine.lmms import SparseMM
from sparsemm_eval.errors import UserError
from sparsemm_eval.methods import FROM_FILES, ModelShape, make_method, method_settings
from sparsemm_eval.paths import tasks_folder
from sparsemm_eval.sweep.estimate import shape_of
from sparsemm_eval.sweep.grid import Grid, Job
from sparsemm_eval.sweep.grid_file import grids_folder, parse_grid, read_grid
from sparsemm_eval.sweep.plan import planned_jobs
from sparsemm_eval.sweep.studies import BUDGETS, demo_grid
from sparsemm_eval.tiny import embedded_checkpoints

SHIPPED = sorted(path.stem for path in grids_folder().glob("*.yaml"))
PATH = Path("some.yaml")
MODELS = [{"name": "tiny", "pretrained": "embedded:qwen2vl"}]
SIMPLE: dict[str, Any] = {
    "models": MODELS, "tasks": ["gqa"], "methods": ["snapkv"], "budgets": [64]
}  # fmt: skip


def grid_of(**changed: Any) -> Grid:
    """A grid through YAML, as a user would write it; None leaves a key out."""
    values = {key: value for key, value in {**SIMPLE, **changed}.items() if value is not None}
    return parse_grid(yaml.safe_dump(values), PATH)


# --- cells and jobs ------------------------------------------------------------------------------


def test_cells_leave_out_what_a_method_does_not_read_and_what_is_the_default() -> None:
    grid = grid_of(
        methods=["adakv", "sparsemm", "fullkv", "local"],
        budgets=[64, 40],
        ratio=[0.1, 0.5],
        kernel_size=7,
    )
    assert grid.cells() == [
        {"method": "fullkv"},
        {"method": "adakv", "budget": 64, "kernel_size": 7},
        {"method": "adakv", "budget": 40, "kernel_size": 7},
        {"method": "sparsemm", "budget": 64, "kernel_size": 7},
        {"method": "sparsemm", "budget": 64, "kernel_size": 7, "ratio": 0.5},
        {"method": "sparsemm", "budget": 40, "kernel_size": 7},
        {"method": "sparsemm", "budget": 40, "kernel_size": 7, "ratio": 0.5},
        {"method": "local", "budget": 64},
        {"method": "local", "budget": 40},
    ]


def test_where_allocations_do_not_differ_there_is_one_cell() -> None:
    grid = grid_of(methods=["snapkv", "random"], allocation=["paper", "exact"], seeds=[0, 3])
    assert grid.cells() == [
        {"method": "snapkv", "budget": 64},
        {"method": "random", "budget": 64},
        {"method": "random", "budget": 64, "seed": 3},
        {"method": "random", "budget": 64, "allocation": "exact"},
        {"method": "random", "budget": 64, "allocation": "exact", "seed": 3},
    ]


def test_any_setting_may_be_a_list() -> None:
    grid = grid_of(methods=["sparsemm", "local"], ratio=1, window=[32, 8], kernel_size=[5, 7])
    assert grid.cells() == [
        {"method": "sparsemm", "budget": 64, "ratio": 1.0},
        {"method": "sparsemm", "budget": 64, "kernel_size": 7, "ratio": 1.0},
        {"method": "sparsemm", "budget": 64, "window": 8, "ratio": 1.0},
        {"method": "sparsemm", "budget": 64, "window": 8, "kernel_size": 7, "ratio": 1.0},
        {"method": "local", "budget": 64},
    ]
    assert sorted(grid.varied()) == ["kernel_size", "window"]
    assert yaml.safe_load(grid.resolved())["ratio"] == 1.0


def test_silenced_heads_are_an_axis_of_every_method() -> None:
    grid = grid_of(
        methods=["fullkv", "snapkv"],
        mask_heads=["none", "visual:0.05"],
        mask_mode=["query", "output"],
    )
    assert grid.cells() == [
        {"method": "fullkv"},
        {"method": "fullkv", "mask_heads": "visual:0.05"},
        {"method": "fullkv", "mask_heads": "visual:0.05", "mask_mode": "output"},
        {"method": "snapkv", "budget": 64},
        {"method": "snapkv", "budget": 64, "mask_heads": "visual:0.05"},
        {"method": "snapkv", "budget": 64, "mask_heads": "visual:0.05", "mask_mode": "output"},
    ]
    assert parse_grid(grid.resolved(), PATH) == grid


def test_files_are_told_apart_by_their_names() -> None:
    names = ["visual", "sensitivity", "sensitivity@share+gqa*2", "some/scores.json"]
    grid = grid_of(
        methods=["sparsemm", "snapkv", "sensitivity"], head_scores=names, sensitivity=["a.json"]
    )
    budget = {"budget": 64}
    assert grid.cells() == [
        *({"method": "sparsemm", **budget, "head_scores": name} for name in names),
        {"method": "snapkv", **budget},
        {"method": "sensitivity", **budget, "sensitivity": "a.json"},
    ]
    assert grid.varied() == ["head_scores"]
    assert parse_grid(grid.resolved(), PATH) == grid
    with pytest.raises(ValueError, match="stands there twice"):
        grid_of(methods=["sparsemm"], head_scores=["visual", "visual"])
    with pytest.raises(ValueError, match="none of the methods here reads head_scores"):
        grid_of(head_scores="visual")


def test_jobs_are_models_times_tasks_times_shards_with_names_of_their_own() -> None:
    models = [*MODELS, {"name": "b", "pretrained": "x/y", "settings": {"dtype": "float16"}}]
    grid = grid_of(models=models, tasks=["gqa", "ocrbench"], shards={"gqa": 3})
    jobs = grid.jobs()
    assert [(job.model.name, job.task, job.shard, job.shards) for job in jobs] == [
        (name, *rest)
        for name in ("tiny", "b")
        for rest in (("gqa", 0, 3), ("gqa", 1, 3), ("gqa", 2, 3), ("ocrbench", 0, 1))
    ]
    assert len({job.name for job in jobs}) == len(set(jobs)) == len(jobs)
    assert jobs[1] == Job(grid.models[0], "gqa", 1, 3)
    assert jobs[1].name == "tiny@gqa@2of3"
    assert len(grid_of(shards=2).jobs()) == 2


def test_models_are_kept_as_they_are_named() -> None:
    models = [*MODELS, {"name": "b", "pretrained": "x/y"}]
    assert [model.pretrained for model in grid_of(models=models).models] == [
        "embedded:qwen2vl",
        "x/y",
    ]


# --- the round trip ------------------------------------------------------------------------------

WORDS = st.text(string.ascii_letters + string.digits + "._+-", min_size=1, max_size=8).filter(
    lambda word: word[0] not in "._+-"
)
SHARES = st.floats(0, 1)
METHODS = ("fullkv", "sparsemm", "snapkv", "pyramidkv", "adakv", "random", "local", "streaming")


def few(items: st.SearchStrategy, most: int = 3) -> st.SearchStrategy:
    return st.lists(items, min_size=1, max_size=most, unique=True)


@st.composite
def grids(draw: st.DrawFn) -> dict[str, Any]:
    """Any grid that can be, with keys given only where a method reads them."""
    methods = draw(few(st.sampled_from(METHODS), 8))
    window = draw(st.integers(1, 40))
    tasks = draw(few(WORDS))
    every = {
        "budget": ("budgets", few(st.integers(50, 4096))),
        "window": ("window", st.just(window)),
        "kernel_size": ("kernel_size", st.sampled_from([1, 3, 5, 7])),
        "pooling": ("pooling", st.sampled_from(["avg", "max"])),
        "group_reduction": ("group_reduction", st.sampled_from(["mean", "max"])),
        "ratio": ("ratio", few(SHARES)),
        "floor": ("floor", SHARES),
        "allocation": ("allocation", few(st.sampled_from(["paper", "exact"]))),
        "seed": ("seeds", few(st.integers(0, 1 << 40))),
        "sinks": ("sinks", st.integers(1, 8)),
    }
    read = {setting for method in methods for setting in method_settings(method)}
    values = {
        key: draw(strategy)
        for setting, (key, strategy) in every.items()
        if setting in read and (setting == "budget" or draw(st.booleans()))
    }
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
    chosen = {"dtype": "float16", "mask_heads": draw(text), "max_pixels": 1003520}
    kept = draw(st.sets(st.sampled_from(sorted(chosen))))
    models = [
        {"name": name, "pretrained": f"x/{name}", "settings": {key: chosen[key] for key in kept}}
        for name in draw(few(WORDS))
    ]
    counts = st.integers(1, 1000)
    shards = st.one_of(counts, st.dictionaries(st.sampled_from(tasks), counts))
    return {
        "name": draw(WORDS),
        "models": models,
        "tasks": tasks,
        "methods": methods,
        **values,
        "samples": draw(st.none() | counts),
        "batch_size": draw(counts),
        "shards": draw(shards),
        "notes": draw(st.lists(text, max_size=2)),
    }


@settings(deadline=None, max_examples=60)
@given(grids())
def test_a_resolved_grid_reads_back_equal(values: dict[str, Any]) -> None:
    grid = Grid.model_validate(values)
    again = parse_grid(grid.resolved(), PATH)
    assert again == grid
    assert again.resolved() == grid.resolved()
    assert again.cells() == grid.cells()


@settings(deadline=None, max_examples=60)
@given(grids())
def test_cells_are_valid_and_differ_and_jobs_cover_every_sample_once(
    values: dict[str, Any],
) -> None:
    grid = Grid.model_validate(values)
    shape = ModelShape(2, 4, 2)
    made = [str(method_of(cell, shape)) for cell in grid.cells()]
    assert len(set(made)) == len(made)
    assert ("fullkv" in grid.methods) == (grid.cells()[0] == {"method": "fullkv"})
    for model in grid.models:
        for task in grid.tasks:
            of_task = [job for job in grid.jobs() if (job.model, job.task) == (model, task)]
            shards = of_task[0].shards
            assert sorted(job.shard for job in of_task) == list(range(shards))


def method_of(cell: dict[str, Any], shape: ModelShape) -> Any:
    given = {key: value for key, value in cell.items() if key != "method"}
    known = method_settings(cell["method"])
    given |= {file: kind.alike(shape) for file, kind in FROM_FILES.items() if file in known}
    return make_method(cell["method"], shape, **given)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "words"), [
    ("models: [\n  a: b\n", "some.yaml, line 3: it is no YAML"),
    ("tasks: [a]\nname: &x [*x]\ntasks: [b]", "some.yaml, line 3: tasks stands there twice"),
    ("models:\n  - {name: a, name: b}", "some.yaml, line 2: name stands there twice"),
    ("tasks: !!python/name:os.system", "some.yaml, line 1: it is no YAML"),
    ("name: \x07", "some.yaml: it is no YAML"),
    ("", "some.yaml: it must be a mapping"),
    ("- a", "some.yaml: it must be a mapping"),
    ("\nmodles: []", "line 2: modles: a grid has no such key; it knows name, models, tasks"),
])  # fmt: skip
def test_broken_files_are_refused_by_line(text: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_grid(text, PATH)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changed", "words"), [
    ({"models": None}, "models is missing; give models with name and pretrained"),
    ({"models": []}, "models=[]: it is empty; give at least one"),
    ({"models": ["a"]}, "models[0]='a': it must be a mapping with name, pretrained"),
    ({"models": [{"name": "a"}]}, "models[0].pretrained is missing; give a folder, a hub"),
    ({"models": [{"name": "a/b", "pretrained": "c"}]}, "models[0].name: 'a/b' names files"),
    ({"models": [{**MODELS[0], "dtype": "float16"}]},
     "models[0].dtype: a model has no such key; it knows name, pretrained, settings"),
    ({"models": [{"name": "a", "pretrained": "embedded:gpt"}]},
     "models[0].pretrained='embedded:gpt': it must be one of embedded:qwen2vl"),
    ({"models": [{**MODELS[0], "settings": {"budget": 3}}]},
     "models[0].settings.budget: setting='budget': it must be one of revision, dtype"),
    ({"models": [{**MODELS[0], "settings": {"dtype": "half"}}]},
     "models[0].settings.dtype='half': it must be one of auto, float32"),
    ({"models": [{**MODELS[0], "settings": {"max_pixels": "many"}}]},
     "models[0].settings.max_pixels='many': it must be an integer"),
    ({"models": [{**MODELS[0], "settings": {"protocol": "papers"}}]},
     "models[0].settings.protocol='papers': it must be one of plain, lmms-eval, paper"),
    ({"models": [{**MODELS[0], "settings": {"jpeg_quality": 200}}]},
     "models[0].settings.jpeg_quality=200: it must be an integer from 1 to 100"),
    ({"models": [{**MODELS[0], "settings": {"revision": [1]}}]},
     "models[0].settings.revision: [1]: it must be text or a number"),
    ({"models": [*MODELS, *MODELS]}, "models[1]: tiny stands there twice"),
    ({"models": [*MODELS, {**MODELS[0], "name": "b"}]}, "models[1]: b is tiny again"),
    ({"tasks": []}, "tasks=[]: it is empty"),
    ({"tasks": ["gqa", "ocrbench", "gqa"]}, "tasks[2]: gqa stands there twice"),
    ({"tasks": "gqa"}, "tasks='gqa': it must be a list"),
    ({"tasks": ["gqa, ocrbench"]}, "tasks[0]: 'gqa, ocrbench' names files"),
    ({"methods": ["snapkv", "sparsmm"]}, "methods[1]: method='sparsmm': it must be one of"),
    ({"methods": ["snapkv", "snapkv"]}, "methods[1]: snapkv stands there twice"),
    ({"budgets": [64, 32]}, "budgets[1]: budget=32 is too small for window=32"),
    ({"budgets": [64, 64]}, "budgets[1]: 64 stands there twice"),
    ({"budgets": ["64"]}, "budgets[0]: budget='64': it must be an integer, mean tokens per KV"),
    ({"budgets": [1.5]}, "budgets[0]: budget=1.5: it must be an integer, mean tokens per KV head"),
    ({"budgets": [True]}, "budgets[0]=True: it must be tokens, a share of the prompt such as 0.1"),
    ({"budgets": []}, "budgets=[]: it is empty"),
    ({"budgets": None}, "budgets is missing: snapkv needs mean tokens per KV head"),
    ({"methods": ["fullkv"]}, "budgets: none of the methods here reads budget (fullkv)"),
    ({"ratio": [0.1]}, "ratio: none of the methods here reads ratio (snapkv)"),
    ({"methods": ["sparsemm"], "ratio": [0, 1.5]}, "ratio[1]: ratio=1.5: it must be a number from"),
    ({"methods": ["sparsemm"], "ratio": "0.1"}, "ratio[0]='0.1': it must be a number"),
    ({"methods": ["sparsemm"], "window": [8, 8]}, "window[1]: 8 stands there twice"),
    ({"pooling": {"a": 1}}, "pooling[0]={'a': 1}: it must be text or a number"),
    ({"mask_heads": [3]}, "mask_heads[0]: 3: it must be text, or none"),
    ({"mask_heads": ["3-1"], "mask_mode": "key"}, "mask_mode[0]='key': it must be one of query"),
    ({"models": [{**MODELS[0], "settings": {"mask_heads": "3-1"}}], "mask_heads": ["3-2"]},
     "models[0].settings.mask_heads: it stands in the settings of model tiny too"),
    ({"axes": {"ratio": [0.1]}}, "axes: a grid has no such key"),
    ({"methods": ["sparsemm"], "ratio": [float("nan")]}, "ratio[0]=nan: it must be a number"),
    ({"methods": ["adakv"], "floor": -1.0}, "floor=-1.0: it must be a number from 0 to 1"),
    ({"seeds": [0]}, "seeds: none of the methods here reads seed (snapkv); leave it out or add "
     "one that does: random"),
    ({"methods": ["random"], "seeds": [0, -1]}, "seeds[1]: seed=-1: it must be an integer"),
    ({"kernel_size": 4}, "kernel_size=4: it must be odd"),
    ({"pooling": "sum"}, "pooling='sum': it must be one of avg, max"),
    ({"allocation": ["best"]}, "allocation[0]: allocation='best': it must be one of paper"),
    ({"samples": 0}, "samples=0: it must be at least 1"),
    ({"batch_size": 1.5}, "batch_size=1.5: it must be an integer"),
    ({"shards": 0}, "shards=0: it must be an integer of at least 1"),
    ({"shards": {"gqa": True}}, "shards.gqa: shards of gqa=True: it must be an integer"),
    ({"shards": {"vqa": 2}}, "shards.vqa: shards of task='vqa': it must be one of gqa"),
    ({"notes": "none"}, "notes='none': it must be a list"),
    ({"budget": 64}, "budget: a grid has no such key; it knows name, models"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence_with_its_place(changed: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        grid_of(**changed)
    message = str(caught.value)
    assert words in message
    assert message.startswith("some.yaml, line ")
    assert "\n" not in message


_BOMB = "a: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)


@pytest.mark.parametrize(("text", "words"), [
    (f"{_BOMB}name: *a29\ntasks: *a28", "its anchors and aliases, written out, are "),
    ("name: &x [*x]", "its anchors and aliases, written out, are without end"),
    (f"name: {'1:' * 6000}1", "line 1: '1:1:1:1:1"),
    ("? [a]\n: b", "it is no YAML"),
    ("? [a]\n: b\n? [a]\n: b", "it is no YAML"),
    (f"tasks: {'[' * 20_000}", "it is no YAML"),
])  # fmt: skip
def test_a_few_bytes_never_take_long_or_much_memory(text: str, words: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"^some\.yaml") as caught:
        parse_grid(text, PATH)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(("changed", "words"), [
    ({"shards": 2_000_000}, "shards=2000000: it must be at most 1000"),
    ({"shards": {"gqa": 10**9}}, "shards of gqa=1000000000: it must be at most 1000"),
    ({"budgets": [*range(32, 400)], "kernel_size": [*range(1, 601, 2)]}, "make 110,400 cells"),
    ({"tasks": [f"t{n}" for n in range(500)], "shards": 900}, "make 450,000 jobs"),
    ({"tasks": [f"t{n}" for n in range(1500)]}, "it must have at most 1,000 entries"),
    ({"notes": {"a": [["x" * 5000] * 50] * 50}}, "notes={'a': [['xxx"),
    ({"samples": 10**30}, "samples=1000000000000000000000000000000: it must be at most"),
    ({"name": "n" * 101}, "names files"),
])  # fmt: skip
def test_bounds_are_looked_at_before_anything_is_made(changed: dict, words: str) -> None:
    with pytest.raises(UserError, match=r"^some\.yaml, line ") as caught:
        grid_of(**changed)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_file_is_a_grid_or_one_sentence(data: st.DataObject) -> None:
    sound = yaml.safe_load(read_grid("demo").resolved())
    text = (
        yaml.dump(data.draw(hostile(sound)))
        if data.draw(st.booleans())
        else data.draw(spoilt(yaml.safe_dump(sound).encode())).decode("utf-8", "replace")
    )
    with suppress(UserError):
        parse_grid(text, PATH).cells()


def test_anchors_that_stay_small_are_read() -> None:
    """As PyYAML itself writes a value that stands in two places."""
    settings = {"dtype": "float32"}
    models = [{**MODELS[0], "name": name, "settings": settings} for name in ("a", "b")]
    models[1]["pretrained"] = "embedded:llava_next"
    assert "&id001" in yaml.safe_dump(models)
    assert grid_of(models=models).models[1].settings == settings


def test_jobs_without_a_sample_are_not_planned() -> None:
    jobs = planned_jobs(grid_of(shards=1000, tasks=["gqa"]).jobs(), {"gqa": 4})
    assert [(job.shard, job.samples) for job in jobs] == [(n, 1) for n in range(4)]


def test_the_line_is_that_of_the_value() -> None:
    text = (
        "models:\n- name: a\n  pretrained: b\ntasks:\n- gqa\nmethods: [snapkv]\n"
        "budgets:\n- 64\n- 3\n"
    )
    with pytest.raises(ValueError, match=r"line 9: budgets\[1\]: budget=3"):
        parse_grid(text, PATH)


def test_a_grid_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one of ablation_components, ablation_ratio, abl"):
        read_grid(tmp_path / "none.yaml")
    broken = tmp_path / "latin.yaml"
    broken.write_bytes("notes: [é]".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.yaml: it is no UTF-8 text"):
        read_grid(broken)


def test_a_grid_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SIMPLE))
    assert read_grid(path).name == "mine"
    path.write_text(yaml.safe_dump({**SIMPLE, "name": "other"}))
    assert read_grid(str(path)).name == "other"


def test_a_grid_takes_every_setting_of_a_model_that_a_plain_run_takes() -> None:
    values = {
        "dtype": "float32", "backend": "torch", "mask_mode": "output", "protocol": "paper",
        "rounding": "loose", "jpeg_quality": 85, "max_new_tokens": 128, "frames": 8,
    }  # fmt: skip
    # How many samples may fail is the whole sweep's, given with its command.
    with pytest.raises(UserError, match="setting='allow_failed'"):
        grid_of(models=[{**MODELS[0], "settings": {"allow_failed": 1}}])
    for name in set(model_settings()) - {"allow_failed"}:
        whole = name.endswith(("pixels", "patches", "edge"))
        value = 100_000 if whole else values.get(name, "auto")
        (model,) = grid_of(models=[{**MODELS[0], "settings": {name: value}}]).models
        assert model.settings == {name: value}
    own = set(inspect.signature(SparseMM.__init__).parameters)
    assert not own & set(model_settings())


# --- the shipped grids ---------------------------------------------------------------------------


def test_these_grids_are_shipped() -> None:
    assert SHIPPED == [
        "ablation_components", "ablation_ratio", "ablation_sensitivity", "demo", "demo_ablations",
        "efficiency", "joined", "paper_general", "paper_ocr", "today", "today_long", "today_video",
    ]  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_every_cell_is_a_valid_method_of_every_model(name: str) -> None:
    grid = read_grid(name)
    assert grid.name == name
    for model in grid.models:
        # That of a model of today is known where its config is.
        shape = shape_of(model) or (ModelShape(28, 28, 4, 128) if "today" in name else None)
        assert shape is not None
        heads = ModelShape(shape.layers, shape.query_heads, shape.kv_heads)
        for cell in grid.cells():
            assert method_of(cell, heads).name == cell["method"]


def test_every_task_is_one_that_lmms_eval_has_or_ours() -> None:
    manager = TaskManager("WARNING", include_path=str(tasks_folder()))
    for name in SHIPPED:
        assert set(read_grid(name).tasks) <= set(manager.all_subtasks)


def test_the_readme_lists_every_grid() -> None:
    text = (tasks_folder() / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in SHIPPED)


def test_the_readmes_grid_can_be() -> None:
    text = (tasks_folder() / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    grid = parse_grid(example, PATH)
    assert len(grid.cells()) == 2 * (1 + 3 * 2 + 3 * 2 * 3)  # with and without silenced heads
    assert len(grid.jobs()) == 4 + 1


def test_the_ablation_of_sensitivity_leaves_kinds_out() -> None:
    grid = read_grid("ablation_sensitivity")
    assert len(grid.cells()) == 1 + 3 * (8 + 1)
    kinds = {
        kind.partition("*")[0]
        for name in grid.axes["head_scores"]
        for kind in name.partition("+")[2].split("+")
        if kind
    }
    assert kinds == set(grid.tasks)


def test_the_demo_grid_is_the_demo() -> None:
    grid = read_grid("demo")
    assert tuple(grid.axes["budget"]) == BUDGETS
    assert len(grid.cells()) == 49
    assert demo_grid(200, grid.batch_size).tasks == grid.tasks
    assert {model.name: model.pretrained for model in grid.models} == {
        name: f"embedded:{name}" for name in embedded_checkpoints()
    }
    assert all(model.settings == {"dtype": "float32"} for model in grid.models)


@pytest.mark.parametrize(("name", "models", "cells"), [
    ("today", 6, 31), ("today_long", 5, 37), ("today_video", 3, 21),
])  # fmt: skip
def test_grids_of_todays_models_need_no_published_scores(
    name: str, models: int, cells: int
) -> None:
    grid = read_grid(name)
    assert (len(grid.models), len(grid.cells())) == (models, cells)
    assert {cell["head_scores"] for cell in grid.cells() if cell["method"] == "sparsemm"} == {
        "sensitivity"
    }
    both = {*read_grid("paper_ocr").tasks, *read_grid("paper_general").tasks}
    assert name != "today" or set(grid.tasks) == both


@pytest.mark.parametrize(("name", "models", "tasks", "cells"), [
    ("paper_ocr", 3, "sparsemm_ocr_rich", 31),
    ("paper_general", 1, "sparsemm_general", 31),
    ("ablation_ratio", 3, None, 8),
    ("ablation_components", 1, None, 18),
    ("efficiency", 3, None, 2),
])  # fmt: skip
def test_the_papers_grids_have_its_cells(
    name: str, models: int, tasks: str | None, cells: int
) -> None:
    grid = read_grid(name)
    assert (len(grid.models), len(grid.cells())) == (models, cells)
    if tasks:
        group = yaml.safe_load((tasks_folder() / f"{tasks}.yaml").read_text())
        assert grid.tasks == group["task"]
    assert grid.notes
    # The paper's window, kernel and pooling are the defaults, so no cell has to say them.
    assert all(cell.keys() <= {"method", "budget", "ratio"} for cell in grid.cells())
    for model in grid.models:
        assert model.settings["protocol"] == "paper"
        # LLaVA's template for Vicuna begins with one.
        assert ("system_prompt" in model.settings) == ("Vicuna" in model.name)
