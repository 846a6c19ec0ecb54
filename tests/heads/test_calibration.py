"""Calibration prompts: of each kind of data, apart from what is scored, and known by their hash."""

import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import pytest
from engine.family_checkpoints import build_qwen3
from engine.fixtures import film
from engine.llava_checkpoints import build_llava
from PIL import Image

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.generation import generation_options
from sparsemm_eval.engine.lmms import make_runner
from sparsemm_eval.engine.requests import Reading, Request
from sparsemm_eval.engine.tasks import requests_of, task_manager
from sparsemm_eval.errors import UserError
from sparsemm_eval.families import Family, find_family
from sparsemm_eval.heads.calibration import (
    ANSWER_TOKENS,
    DEFAULT_QUESTION,
    Calibration,
    CalibrationPrompt,
    calibration_prompts,
    check_calibration,
    documents_hash,
    read_calibration,
    warnings_of,
)
from sparsemm_eval.heads.sensitivity import measure
from sparsemm_eval.tiny import embedded_checkpoints
from sparsemm_eval.tiny.benchmarks import BENCHMARKS

GREEDY = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}


@pytest.fixture(scope="module", params=["qwen2vl", "llava_next"])
def reader(request: pytest.FixtureRequest) -> Checkpoint:
    """An embedded model, in float32."""
    return Checkpoint(f"embedded:{request.param}", dtype="float32")


def picture(shade: int = 200) -> Image.Image:
    return Image.new("RGB", (60, 40), (shade, 90, 10))


def lines(folder: Path, *content: dict | str) -> str:
    """A JSONL file of these lines, beside pictures a.png and b.png."""
    for name, shade in (("a", 10), ("b", 250)):
        picture(shade).save(folder / f"{name}.png")
    path = folder / "asked.jsonl"
    texts = (one if isinstance(one, str) else json.dumps(one) for one in content)
    path.write_text("".join(f"{text}\n" for text in texts))
    return str(path)


def readings(checkpoint: Checkpoint, requests: Iterable[Request]) -> list[Reading]:
    """As a run reads them."""
    family = checkpoint.family()
    return [request.read(checkpoint.processor, family) for request in requests]


def own_task(folder: Path, splits: dict[str, int], **config: object) -> None:
    """A task file "own" on as many pictures a split; picture n is asked "n?"."""
    files = {}
    for split, count in splits.items():
        rows = [{"shade": n, "question": f"{split} {n}?", "answer": "x"} for n in range(count)]
        datasets.Dataset.from_list(rows).to_json(folder / f"{split}.jsonl")
        files[split] = str(folder / f"{split}.jsonl")
    given = {
        "task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": files},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "question",
        "doc_to_target": "answer", "generation_kwargs": {"max_new_tokens": 200},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    } | config  # fmt: skip
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in given.items())
    text = text.replace('"!own"', "!function own.visual")
    (folder / "own.yaml").write_text(text)
    (folder / "own.py").write_text(
        "from PIL import Image\n\n\ndef visual(doc):\n"
        "    return [Image.new('RGB', (60, 40), (doc['shade'], 90, 10))]\n"
    )


# --- tasks ---------------------------------------------------------------------------------------


def test_miniatures_are_drawn_apart_from_the_benchmarks(reader: Checkpoint) -> None:
    """All eight, each kind in turn, and none of their documents is scored."""
    tasks = [f"{name}_mini" for name in BENCHMARKS]
    calibration = read_calibration(",".join(tasks), 3)
    prompts = list(calibration.prompts(reader))
    assert [prompt.kind for prompt in prompts] == tasks * 3
    assert calibration.total == len(prompts) == 3 * len(tasks)
    assert len({prompt.digest for prompt in prompts}) == len(prompts)
    manager = task_manager(tasks)
    for task in tasks:
        requests = list(requests_of(task, manager, 30))
        scored = readings(reader, requests)
        own = [prompt for prompt in prompts if prompt.kind == task]
        assert {one.digest for one in own}.isdisjoint(one.digest for one in scored)
        for prompt in own:
            assert dict(prompt.options) == {
                **GREEDY,
                "max_new_tokens": dict(generation_options(requests[0].generation)[0])[
                    "max_new_tokens"
                ],
                "pad_token_id": reader.processor.tokenizer.pad_token_id,
            }
            assert prompt.visuals[0].mode == scored[0].visuals[0].mode
    where = [source.where for source in calibration.sources]
    assert where == ["3 drawn with seed 1; the benchmark's is 0"] * len(tasks)


def test_a_document_has_one_digest_however_it_is_read(tmp_path: Path) -> None:
    """By any model, with any settings, in a run or as calibration: from what the task shows."""
    own_task(tmp_path, {"test": 4}, doc_to_visual="!own")
    qwen, llava = (
        Checkpoint(folder, dtype="float32") for folder in embedded_checkpoints().values()
    )
    calibrated = [
        prompt.digest for prompt in calibration_prompts(qwen, "own", 4, include_path=[tmp_path])
    ]
    manager = task_manager(["own"], [tmp_path])
    requests = list(requests_of("own", manager))
    for checkpoint in (qwen, llava):
        runner = make_runner(
            checkpoint,
            [{"method": "fullkv"}],
            tmp_path / "answers",
            settings={"system_prompt": "Be brief.", "jpeg_quality": 50},
        )
        found = [request.read(runner.processor, runner.family) for request in requests]
        assert [one.digest for one in found] == calibrated
    assert len(set(calibrated)) == 4


def test_prompts_are_fed_as_in_a_run(reader: Checkpoint, tmp_path: Path) -> None:
    own_task(tmp_path, {"test": 2}, doc_to_visual="!own")
    prompts = list(calibration_prompts(reader, "own", 2, include_path=[tmp_path]))
    scored = readings(reader, requests_of("own", task_manager(["own"], [tmp_path])))
    assert [one.prompt for one in prompts] == [one.prompt for one in scored]
    assert [one.visuals[0].tobytes() for one in prompts] == [
        one.visuals[0].tobytes() for one in scored
    ]


def test_the_last_of_the_split_that_is_scored(reader: Checkpoint, tmp_path: Path) -> None:
    """A run of the first six shares none of them, and a run of all does."""
    own_task(tmp_path, {"test": 9, "train": 9}, doc_to_visual="!own")
    calibration = read_calibration("own", 3, [tmp_path])
    assert calibration.sources[0].where == "the last 3 of 9 of test, the split that is scored"
    (warning,) = warnings_of(calibration)
    assert "score its first 6 samples at most (--limit 6" in warning
    (warning,) = warnings_of(read_calibration("own", 20, [tmp_path]))
    assert "the last 9 of 9 of test" in warning
    assert "calibrate on fewer (-n)" in warning
    digests = {prompt.digest for prompt in calibration.prompts(reader)}
    manager = task_manager(["own"], [tmp_path])
    some, every = (
        {one.digest for one in readings(reader, requests_of("own", manager, count))}
        for count in (6, None)
    )
    assert digests.isdisjoint(some)
    assert digests < every


def test_a_training_split_comes_first(reader: Checkpoint, tmp_path: Path) -> None:
    own_task(tmp_path, {"test": 3, "train": 5}, doc_to_visual="!own", training_split="train")
    calibration = read_calibration("own", 2, [tmp_path])
    assert calibration.sources[0].where == "the first 2 of 5 of its training split, train"
    assert warnings_of(calibration) == []
    assert ["train 0?" in one.prompt for one in calibration.prompts(reader)] == [True, False]


def test_a_task_that_has_no_score_here_can_be_read(reader: Checkpoint, tmp_path: Path) -> None:
    """Calibration asks for no answer, judge or java; and a task of text alone has no images."""
    metric = {"metric": "submission", "aggregation": "!own", "higher_is_better": True}
    own_task(tmp_path, {"test": 2}, metric_list=[metric], process_results="!own")
    prompts = list(calibration_prompts(reader, "own", 5, include_path=[tmp_path]))
    assert [prompt.visuals for prompt in prompts] == [(), ()]
    assert "test 1?" in prompts[1].prompt


def test_sampling_of_a_task_is_left_out_and_long_answers_end(
    reader: Checkpoint, tmp_path: Path
) -> None:
    hot = {"max_new_tokens": 200, "temperature": 1.0, "num_beams": 4, "until": ["\n"]}
    own_task(tmp_path, {"test": 1}, generation_kwargs=hot)

    def options(**given: int) -> dict:
        (prompt,) = calibration_prompts(reader, "own", 1, include_path=[tmp_path], **given)
        return dict(prompt.options)

    pad = {"pad_token_id": reader.processor.tokenizer.pad_token_id}
    assert options() == {**GREEDY, **pad, "max_new_tokens": ANSWER_TOKENS}
    assert options(max_new_tokens=500)["max_new_tokens"] == 200
    assert options(max_new_tokens=7)["max_new_tokens"] == 7


# --- folders and files ---------------------------------------------------------------------------


def test_a_folder_of_images(reader: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, shade in (("b.png", 2), ("a.JPG", 1), ("c.webp", 3)):
        picture(shade).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    prompts = list(calibration_prompts(reader, str(folder), 2))
    assert [prompt.kind for prompt in prompts] == ["photos"] * 2
    assert prompts[1].visuals[0].tobytes() == picture(2).tobytes()
    assert all(DEFAULT_QUESTION in prompt.prompt for prompt in prompts)
    assert dict(prompts[0].options)["max_new_tokens"] == ANSWER_TOKENS
    (first, *_) = calibration_prompts(reader, str(folder), 2, question="What colour?")
    assert "What colour?" in first.prompt
    assert first.digest != prompts[0].digest


def test_a_file_of_images_and_of_text_alone(reader: Checkpoint, tmp_path: Path) -> None:
    data = lines(
        tmp_path,
        {"question": "What is 2 + 2?", "kind": "sums"},
        {"question": "What is it?", "image": "a.png"},
        {"question": "And this?", "image": "b.png"},
        {"question": "What is 1 + 1?", "kind": "sums"},
        {"question": "Never asked.", "image": "b.png"},
    )
    calibration = read_calibration(data, 2)
    prompts = list(calibration.prompts(reader))
    assert [prompt.kind for prompt in prompts] == ["sums", "asked", "sums", "asked"]
    assert [len(prompt.visuals) for prompt in prompts] == [0, 1, 0, 1]
    assert "1 + 1" in prompts[2].prompt
    assert calibration.total == 4
    for prompt in prompts:
        inputs = reader.processor(
            text=[prompt.prompt], images=list(prompt.visuals) or None, return_tensors="pt"
        )
        assert inputs["input_ids"].shape[1] > 1


def test_kinds_of_unlike_size_come_in_turn_until_they_end(
    reader: Checkpoint, tmp_path: Path
) -> None:
    counts = {"x": 1, "y": 4, "z": 2}
    data = lines(
        tmp_path,
        *(
            {"question": f"{n}", "kind": kind}
            for kind, count in counts.items()
            for n in range(count)
        ),
    )
    kinds = [prompt.kind for prompt in calibration_prompts(reader, data, 3)]
    assert kinds == ["x", "y", "z", "y", "z", "y"]
    assert Counter(kinds) == {kind: min(count, 3) for kind, count in counts.items()}


def test_prompts_are_read_one_by_one(reader: Checkpoint, tmp_path: Path) -> None:
    """A broken one is named when it is its turn, and few images are held."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(3):
        picture(n).save(folder / f"{n}.png")
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    prompts = calibration_prompts(reader, str(folder), 3)
    assert len(list(islice(prompts, 2))) == 2
    with pytest.raises(UserError, match=r"photos, 2\.png: .*2\.png cannot be read"):
        next(prompts)


def test_the_hash_of_all_documents_knows_their_kinds() -> None:
    one = documents_hash({"a": ("1", "2"), "b": ("3",)})
    assert one == documents_hash({"a": ["1", "2"], "b": ["3"]})
    assert one != documents_hash({"a": ("1",), "b": ("2", "3")})
    assert len(one) == 64


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "words"), [
    ([], "it has no lines"),
    (["{"], ":1: it is no JSON"),
    (["[]"], ":1: line: Input should be"),
    ([{"image": "a.png"}], ":1: question: Field required"),
    ([{"question": " "}], ":1: question: it must have a word in it"),
    ([{"question": 5}], ":1: question: Input should be a valid string"),
    ([{"question": "a", "colour": "red"}], ":1: colour: Extra inputs"),
    ([{"question": "a"}, {"question": "b", "image": "none.png"}], ":2: image none.png: it cannot"),
    ([{"question": "a", "image": "asked.jsonl"}], ":1: image asked.jsonl: it cannot be read"),
    ([{"question": "a", "image": "."}], "is no file but a folder"),
    ([{"question": "a", "kind": " "}], ":1: kind: it must have a word in it"),
    ([{"question": "a", "kind": "k" * 101}], ":1: kind: String should have at most 100"),
])  # fmt: skip
def test_lines_that_cannot_be_read(content: list, words: str, tmp_path: Path) -> None:
    data = lines(tmp_path, *content)
    with pytest.raises(UserError) as caught:
        check_calibration(data, 5)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        read_calibration(data, 5)


def test_data_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no image")
    for data, words in {
        str(tmp_path / "nowhere"): "there is no such file or folder",
        "photos.jsonl": "there is no such file or folder",
        "": "there is no such file or folder",
        " , ": "there is no such file or folder",
        str(tmp_path / "empty"): "it holds no images",
        str(tmp_path / "bad"): "a.png: it cannot be read",
    }.items():
        with pytest.raises(UserError, match=words):
            check_calibration(data, 5)
    with pytest.raises(UserError, match="n=0: it must be an integer of at least 1"):
        check_calibration("docvqa_mini", 0)
    with pytest.raises(UserError, match="tasks and JSONL files bring their own questions"):
        check_calibration("docvqa_mini", 1, "Why?")
    with pytest.raises(UserError, match="it must have a word in it"):
        check_calibration(str(tmp_path), 1, " ")


@pytest.mark.parametrize(("task", "words"), [
    ("docvqa_vla", "there is no task docvqa_vla"),
    ("docvqa_mini,ovo_forward", "is of output_type generate_until_multi_round"),
    ("sparsemm_general_mini", "is a group of tasks"),
])  # fmt: skip
def test_tasks_that_cannot_be_read(task: str, words: str) -> None:
    check_calibration(task, 5)
    with pytest.raises(UserError, match=words):
        read_calibration(task, 5)


def test_a_task_of_videos_is_read(tmp_path: Path) -> None:
    """By a model that reads them; its documents are known again whatever frames are drawn."""
    own_task(tmp_path, {"test": 2}, doc_to_visual="!own")
    for shade in range(2):
        film(tmp_path / f"{shade}.mp4", 12, (64, 48), seed=shade)
    code = f"def visual(doc):\n    return ['{tmp_path}/' + str(doc['shade']) + '.mp4']\n"
    (tmp_path / "own.py").write_text(code)
    seeing = Checkpoint(build_qwen3(tmp_path / "model"), dtype="float32")
    own = partial(calibration_prompts, data="own", count=2, include_path=[tmp_path])
    few, many = (list(own(seeing, family=seeing.family(frames=n))) for n in (4, 8))
    assert [len(one.visuals[0].frames) for one in (*few, *many)] == [4, 4, 8, 8]
    assert [one.digest for one in few] == [one.digest for one in many]
    found = measure(seeing, iter(few), 2, budgets=(16,), window=8)
    assert found.kinds["own"].prompts == 2
    blind = Checkpoint(build_llava("llama", tmp_path / "llava"), dtype="float32")
    with pytest.raises(UserError, match="own, test 0: a video is shown, and of a llava_next model"):
        list(own(blind))


def test_what_a_tasks_code_raises_is_one_sentence(reader: Checkpoint, tmp_path: Path) -> None:
    own_task(tmp_path, {"test": 2}, doc_to_visual="!own")
    (tmp_path / "own.py").write_text("def visual(doc):\n    return doc['nothing']\n")
    with pytest.raises(UserError, match=r"own, test 1: it cannot be read \(KeyError: 'nothing'\)"):
        list(calibration_prompts(reader, "own", 1, include_path=[tmp_path]))


def test_a_template_that_fails_is_refused_at_once(reader: Checkpoint) -> None:
    class Forgetful(Family):
        model_type = "none"
        lmms_name = "none"

        def configure(self, processor: object) -> object:
            return type("Processor", (), {
                "tokenizer": reader.processor.tokenizer,
                "apply_chat_template": lambda *_, **__: "",
            })()  # fmt: skip

    calibration: Calibration = read_calibration("docvqa_mini", 1)
    with pytest.raises(UserError, match="leaves out the question"):
        calibration.prompts(reader, Forgetful())


def test_a_familys_settings_go_into_the_prompt(reader: Checkpoint) -> None:
    family = find_family(reader.config.model_type)(system_prompt="Be brief.")
    plain, told = (
        next(iter(calibration_prompts(reader, "docvqa_mini", 1, family=one)))
        for one in (None, family)
    )
    assert isinstance(told, CalibrationPrompt)
    assert "Be brief." in told.prompt
    assert told.digest == plain.digest
