"""Answers without scores, in shards: each document once, and found again by whoever scores."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.fixtures import answer, log, rows, score_all
from hypothesis import given
from hypothesis import strategies as st
from lmms_eval.api.instance import Instance

from sparsemm_eval.engine import requests as reading
from sparsemm_eval.engine import runner as runners
from sparsemm_eval.engine import tasks
from sparsemm_eval.engine.answers import SampleFailures
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import make_runner
from sparsemm_eval.engine.requests import Memo, Request, image_hash
from sparsemm_eval.engine.runner import AllFailed, Runner
from sparsemm_eval.errors import UserError
from sparsemm_eval.paths import cache_folder
from sparsemm_eval.tiny.benchmarks import build

TASK = "docvqa_mini"
CELLS = (
    {"method": "fullkv"},
    {"method": "snapkv", "budget": 24, "window": 8},
    {"method": "adakv", "budget": 12, "window": 8},
)
RANKS = """
import sys
from accelerate import PartialState
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import make_runner
from sparsemm_eval.engine.runner import raise_failures
from sparsemm_eval.engine.tasks import requests_of, task_manager
from sparsemm_eval.sweep.sweep import leave_ranks
from sparsemm_eval.tiny import default_checkpoint
ranks = PartialState(cpu=True)
checkpoint = Checkpoint(default_checkpoint(), dtype="float32")
cells = [{"method": "fullkv"}, {"method": "local", "budget": 24}]
runner = make_runner(checkpoint, cells, sys.argv[1], 2)
part = (7, 1, 2, ranks.process_index, ranks.num_processes)
requests = requests_of("docvqa_mini", task_manager(["docvqa_mini"]), *part)
raise_failures(runner.answer(requests), runner.store, ranks.num_processes)
leave_ranks()
"""


def runner_for(reader: Checkpoint, folder: Path) -> Runner:
    return make_runner(reader, CELLS, folder, 4)


def documents(folder: Path, finished: bool = False) -> Counter[tuple[str, str]]:
    """How often each (cell, document) is stored, failures included or not."""
    return Counter(
        (row.cell, row.doc_id) for row in rows(folder) if row.text is not None or not finished
    )


# --- which documents ----------------------------------------------------------------------------


class Task:
    """Builds requests as lmms-eval's tasks do, of nothing."""

    def __init__(self, size: int, repeats: int = 1) -> None:
        self.size, self.repeats, self.instances = size, repeats, []

    def get_config(self, key: str) -> int:
        return 0

    def build_all_requests(self, limit: int | None, rank: int, world_size: int) -> None:
        chosen = list(range(self.size if limit is None else min(limit, self.size)))
        chosen = chosen[rank::world_size]
        padding = {} if chosen else {"__padding_only__": True}
        self.instances = [
            Instance(
                "generate_until",
                (),
                0,
                {"task": "t", "doc_id": number, "repeats": self.repeats} | padding,
            )
            for number in chosen or [0]
        ]


@given(
    st.integers(1, 40),
    st.none() | st.integers(1, 50),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_shards_and_ranks_part_the_documents(
    size: int, limit: int | None, shards: int, ranks: int, repeats: int
) -> None:
    """Each document once, however many shards and ranks there are, and none beyond the limit."""
    found: Counter[int] = Counter()
    for shard in range(shards):
        of_shard: Counter[int] = Counter()
        for rank in range(ranks):
            asked = tasks._instances(
                Task(size, repeats), limit, shard + shards * rank, shards * ranks
            )
            of_shard.update(request.doc_id for request in asked)
        assert set(of_shard) == set(range(shard, min(size, limit or size), shards))
        found.update(of_shard)
    assert found == dict.fromkeys(range(min(size, limit or size)), repeats)


def test_lmms_eval_parts_documents_so(reader: Checkpoint, answers: Path) -> None:
    """The stand-in above does as the real tasks do, an empty part included."""
    manager = tasks.task_manager([TASK])
    ((_, task),) = tasks._leaves(tasks.get_task_dict([TASK], manager, "chat"))
    for limit, part, parts in ((7, 1, 3), (7, 6, 7), (3, 5, 8), (None, 40, 60)):
        expected = tasks._instances(Task(200), limit, part, parts)
        real = tasks._instances(task, limit, part, parts)
        assert [request.doc_id for request in real] == [request.doc_id for request in expected]


@pytest.mark.parametrize(
    "wrong", [{"shard": 2, "shards": 2}, {"shard": -1}, {"shards": 0}, {"samples": 0}]
)
def test_shards_that_cannot_be(
    reader: Checkpoint, answers: Path, unloaded: None, wrong: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="must be an integer of at least"):
        answer(runner_for(reader, answers), TASK, **wrong)


def test_an_unknown_task(reader: Checkpoint, answers: Path, unloaded: None) -> None:
    with pytest.raises(ValueError, match="there is no task nonsense"):
        answer(runner_for(reader, answers), "nonsense")


# --- answers ------------------------------------------------------------------------------------


def test_shards_answer_what_a_scored_run_asks(
    reader: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of stored answers are those of one plain run; nothing is computed for them."""
    plain = runner_for(reader, tmp_path / "plain")
    expected = score_all(plain, CELLS, TASK, 9, tmp_path / "plain")
    told: list[int] = []
    for shard in (1, 0):
        runner = runner_for(reader, tmp_path / "answers")
        answer(runner, TASK, 9, shard, 2, told.append)
    assert sum(told) == 9 * len(CELLS)
    assert max(told) == 4 * len(CELLS)
    stored = documents(tmp_path / "answers")
    assert set(stored.values()) == {1}
    assert len(stored) == 9 * len(CELLS)
    answer(runner, TASK, 9, progress=told.append)
    assert sum(told) == 9 * len(CELLS)

    def fail(*_: Any) -> None:
        raise AssertionError("something is computed")

    monkeypatch.setattr(runners._Pass, "_compute", fail)
    scored = score_all(runner_for(reader, tmp_path / "answers"), CELLS, TASK, 9, tmp_path)
    for ours, theirs in zip(scored, expected, strict=True):
        assert results(ours) == results(theirs)
        assert samples_file(ours).read_text() == samples_file(theirs).read_text()


def results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["results"]


def samples_file(path: Path) -> Path:
    return path.with_name(path.name.replace("_results.json", f"_samples_{TASK}.jsonl"))


def test_a_sample_that_fails_leaves_the_others_theirs(
    reader: Checkpoint, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell has all but it, and says so; once it can be read, it alone is computed."""
    read = Request.read

    def broken(request: Request, *given: Any) -> Any:
        found = read(request, *given)
        if image_hash(found.visuals[0]) == lost:
            raise OSError("image file is truncated")
        return found

    runner = runner_for(reader, answers)
    answer(runner, TASK, samples=2)
    lost = next(parts for _, (parts, _) in sorted(runner.memo._known.items()))["images"][0]
    monkeypatch.setattr(Request, "read", broken)
    with pytest.raises(SampleFailures, match="1 samples failed"):
        answer(runner_for(reader, answers / "again"), TASK, samples=3)
    stored = rows(answers / "again")
    assert len([row for row in stored if row.text is not None]) == 2 * len(CELLS)
    assert Counter(row.cell for row in stored if row.error) == {
        runner.words(cell, TASK): 1 for cell in runner.cells
    }
    monkeypatch.setattr(Request, "read", read)
    answer(runner_for(reader, answers / "again"), TASK, samples=3)
    finished = documents(answers / "again", finished=True)
    assert len(finished) == 3 * len(CELLS)
    assert set(finished.values()) == {1}


def test_ranks_share_a_shard(answers: Path) -> None:
    """Two processes of torchrun, on documents 1, 3 and 5 of 7."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--master_port", str(20000 + os.getpid() % 20000),
        "--no-python", sys.executable, "-c", RANKS, str(answers),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    stored = documents(answers)
    assert set(stored.values()) == {1}
    assert {document for _, document in stored} == {f"validation {n}" for n in (1, 3, 5)}
    assert len(stored) == 6
    assert len({row.file for row in rows(answers)}) == 2


# --- read once ----------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the images that are hashed and the prompts that are read."""
    calls: Counter[str] = Counter()
    for name in ("read_chat", "image_hash"):
        function = getattr(reading, name)

        def counted(*given: Any, _name: str = name, _function: Any = function) -> Any:
            calls[_name] += 1
            return _function(*given)

        monkeypatch.setattr(reading, name, counted)
    return calls


def test_all_cells_read_an_image_once(
    reader: Checkpoint, answers: Path, opened: Counter[str], tmp_path: Path
) -> None:
    runner = runner_for(reader, answers)
    answer(runner, TASK, samples=5)
    assert opened == {"read_chat": 5, "image_hash": 5}
    score_all(runner, CELLS, TASK, 5, tmp_path)
    assert opened == {"read_chat": 5, "image_hash": 5}
    # Only what lacks an answer is opened again.
    answer(runner, TASK, samples=7)
    assert opened == {"read_chat": 7, "image_hash": 7}
    answer(runner_for(reader, answers), TASK, samples=7)
    assert opened == {"read_chat": 14, "image_hash": 14}


def test_only_cells_that_lack_an_answer_compute_it(reader: Checkpoint, answers: Path) -> None:
    """A cell that joins a finished sweep has the others' answers left alone."""
    answer(runner_for(reader, answers), TASK, samples=3)
    before = rows(answers)
    answer(make_runner(reader, [*CELLS, {"method": "local", "budget": 24}], answers, 2), TASK, 5)
    after = rows(answers)
    assert [row for row in after if row in before] == before
    assert set(documents(answers).values()) == {1}
    assert len(after) == 5 * (len(CELLS) + 1)


def test_a_memo_knows_data_sets_apart() -> None:
    class Documents(list):
        _fingerprint = "one"

    def request(documents: Any = None, **changed: Any) -> Request:
        given = {"task": TASK, "document": "test 0", "number": 0, "messages": None}
        documents = Documents() if documents is None else documents
        return Request(**{**given, "generation": {}, "documents": documents, **changed})

    memo = Memo()
    memo.keep(request(), {"prompt": "p"}, "d")
    assert memo.find(request()) == ({"prompt": "p"}, "d")
    other = Documents()
    other._fingerprint = "two"
    assert memo.find(request(other)) is None
    assert memo.find(request(document="test 1")) is None
    assert memo.find(request(task="another")) is None
    assert memo.find(request(generation={"max_new_tokens": 9})) is None
    memo.keep(request([]), {"prompt": "p"}, "d")
    assert memo.find(request([])) is None


# --- faults that are no sample's ------------------------------------------------------------------


@pytest.mark.parametrize("error", [TypeError("one of ours"), AttributeError("one of ours")])
def test_a_bug_ends_the_run(
    reader: Checkpoint, answers: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Runner, "decode_batch", broken)
    with pytest.raises(type(error), match="one of ours"):
        answer(runner_for(reader, answers), TASK, samples=6)
    assert rows(answers) == []


def test_first_samples_that_all_fail_alike_end_the_run(
    reader: Checkpoint, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the traceback of the first; what fails after an answer, or unlike, is a sample's."""
    decode = Runner.decode_batch
    calls: list[int] = []

    def broken(runner: Runner, samples: Any, *given: Any) -> Any:
        calls.append(len(samples))
        raise ValueError("a shape does not fit")

    monkeypatch.setattr(Runner, "decode_batch", broken)
    with pytest.raises(AllFailed, match="first 4 samples all failed alike") as caught:
        answer(runner_for(reader, answers), TASK, samples=9)
    assert "in broken" in str(caught.value)
    assert sum(size == 1 for size in calls) == 4

    def unlike(runner: Runner, samples: Any, *given: Any) -> Any:
        raise ValueError(f"document {samples[0].doc_id} is odd")

    monkeypatch.setattr(Runner, "decode_batch", unlike)
    with pytest.raises(SampleFailures, match="5 samples failed"):
        answer(runner_for(reader, answers / "unlike"), TASK, samples=5)

    def late(runner: Runner, samples: Any, *given: Any) -> Any:
        if any(sample.doc_id != "validation 0" for sample in samples):
            raise ValueError("a shape does not fit")
        return decode(runner, samples, *given)

    monkeypatch.setattr(Runner, "decode_batch", late)
    with pytest.raises(SampleFailures, match="4 samples failed"):
        answer(runner_for(reader, answers / "late"), TASK, samples=5)


def test_a_method_that_gives_no_numbers_is_said_in_its_own_sentence(
    reader: Checkpoint, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with a traceback: it is the user's to mend."""

    def broken(*_: Any) -> None:
        raise UserError("method=mine: Mine gives a score that is NaN")

    monkeypatch.setattr(Runner, "decode_batch", broken)
    with pytest.raises(
        UserError, match=r"^docvqa_mini: method=mine: Mine gives a score that is NaN$"
    ):
        answer(runner_for(reader, answers), TASK, samples=9)


def test_memory_that_is_never_enough_ends_the_run(
    reader: Checkpoint, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> None:
        raise MemoryError("Unable to allocate 3 GiB for an array")

    monkeypatch.setattr(Runner, "decode_batch", short)
    with pytest.raises(UserError, match=r"ran out of memory .* choose a smaller model"):
        answer(runner_for(reader, answers), TASK, samples=9)


# --- scores -------------------------------------------------------------------------------------


def test_samples_files_hold_text_and_scores_and_no_image(
    reader: Checkpoint, tmp_path: Path
) -> None:
    runner = runner_for(reader, tmp_path / "answers")
    paths = score_all(runner, CELLS, TASK, 4, tmp_path)
    said = {(row.cell, row.doc_id): row.text for row in rows(tmp_path / "answers")}
    for cell, path in zip(runner.cells, paths, strict=True):
        assert "samples" not in json.loads(path.read_text())
        text = samples_file(path).read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line["doc_id"] for line in lines] == list(range(4))
        for line in lines:
            document = f"validation {line['doc_id']}"
            assert line["filtered_resps"] == said[runner.words(cell, TASK), document]
            assert 0 <= line["anls"] <= 1
            assert line["target"]
            assert isinstance(line["input"], str)
        assert "base64" not in text
        assert len(text) < 4 * 2000


@pytest.fixture
def ocrbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """lmms-eval's own ocrbench, its counting metric included, on our drawn images."""
    import lmms_eval.tasks.ocrbench as package

    folder = tmp_path / "tasks"
    folder.mkdir()
    original = Path(next(iter(package.__path__))) / "ocrbench.yaml"
    (folder / "local.yaml").write_text(
        f"include: {original}\ntask: ocrbench_local\ndataset_kwargs: {{}}\n"
        f"dataset_path: {build('ocrbench', cache_folder() / 'benchmarks')}\n"
    )
    monkeypatch.setattr(tasks, "tasks_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return "ocrbench_local"


def test_ocrbench_counts_each_cell_from_zero(
    reader: Checkpoint, tmp_path: Path, ocrbench: str
) -> None:
    """Its metric adds up in a global of its module, and divides by 1,000."""
    cells = [{"method": "fullkv"}, {"method": "fullkv", "mask_heads": "0-0"}, {"method": "fullkv"}]
    scores = []
    for number, cell in enumerate(cells):
        runner = make_runner(reader, [cell], tmp_path / "answers", 8)
        (path,) = score_all(runner, [cell], ocrbench, 8, tmp_path / str(number))
        scores.append(results(path)[ocrbench]["ocrbench_accuracy,none"])
    assert scores[0] == scores[2]
    assert 0 < max(scores) <= 8 / 1000
    together = make_runner(reader, cells[:2], tmp_path / "answers", 8)
    paths = score_all(together, cells[:2], ocrbench, 8, tmp_path / "together")
    assert [results(path)[ocrbench]["ocrbench_accuracy,none"] for path in paths] == scores[:2]
    # What it writes lies with the results, not where the process happens to run.
    assert not (tmp_path / "results").exists()
    assert list((tmp_path / "together").rglob("ocrbench_results.txt"))
    with log() as lines:
        answer(together, ocrbench, samples=8)
    assert not [line for line in lines if line.startswith("WARNING")]
