"""Damage files that are written and read here, and look what becomes of them.

``python tests/reliability/fuzz.py --minutes 10 [--out results/reliability/fuzz.json]``

Each case copies an undamaged folder, damages one file in it, and runs commands on it. A case is

- wrong if a command shows other numbers, answers or pictures than for the undamaged folder, and
  neither fails nor names the damaged file;
- a crash if a command ends with a traceback or a signal, does not end, or takes gigabytes.

``--case SEED/NUMBER`` runs one case again and shows all that was said.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from loguru import logger
from PIL import Image
from reliability.damage import damage_bytes, damage_kind, damage_values

from sparsemm_eval.report.provenance import provenance

GRID = """
models:
  - {name: qwen2vl, pretrained: "embedded:qwen2vl", settings: {dtype: float32}}
tasks: [docvqa_mini, vqav2_mini]
methods: [fullkv, sparsemm, snapkv]
budgets: [64, 12]
window: 8
shards: {docvqa_mini: 2}
samples: 6
batch_size: 6
"""
# Seconds that a command may take, and bytes that it may take more than before.
PATIENCE, MEMORY = 120, 3 << 30
_SENTENCE = "sparsemm-eval: "
_TRACEBACK = "Traceback (most recent call last)"
# Of what a failed case said.
_SHOWN = 1_500


@dataclass(frozen=True)
class Seen:
    """What a command did.

    Parameters
    ----------
    code : int
        Its exit code, negative for a signal.
    text : str
        All it said, and what it wrote.
    fault : str
        Why it is a crash whatever it said; empty if it is none.
    """

    code: int
    text: str
    fault: str = ""


@dataclass(frozen=True)
class Look:
    """One way to read a folder.

    Parameters
    ----------
    name : str
    run : callable
        Reads the folder, prints what it finds, and raises what a user is told.
    share : float
        In how many of the cases.
    final : bool
        Whether it makes what is missing anew, so that all is as before.
    """

    name: str
    run: Callable[[Path], None]
    share: float = 1.0
    final: bool = False


@dataclass(frozen=True)
class Target:
    """A folder that is damaged, and what reads it.

    Parameters
    ----------
    name : str
    files : str
        Pattern of the files to damage.
    looks : tuple of Look
    exact : bool
        Whether damaged bytes must show: false where a file has no room for a digest.
    weight : float
        How often it is the one that is damaged.
    """

    name: str
    files: tuple[str, ...]
    looks: tuple[Look, ...]
    exact: bool = True
    weight: float = 1


@dataclass
class Tallied:
    """Outcomes of one kind of file."""

    cases: int = 0
    refused: int = 0
    named: int = 0
    same: int = 0
    wrong: int = 0
    crashed: int = 0


@dataclass
class Outcome:
    """All cases so far."""

    by_target: dict[str, Tallied] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)


# --- ways to read --------------------------------------------------------------------------------


def _command(*words: str) -> Callable[[Path], None]:
    """One of our commands on a folder; FOLDER and OUT stand for it and for a new folder in it."""

    def run(folder: Path) -> None:
        from sparsemm_eval.cli import app

        places = {"FOLDER": str(folder), "OUT": str(folder.parent / "out")}
        given = [re.sub("FOLDER|OUT", lambda m: places[m[0]], word) for word in words]
        sys.argv = ["sparsemm-eval", *given]
        app(given)

    return run


def _page(folder: Path) -> None:
    """The page of a sweep's folder, without its dates."""
    try:
        _command("report", "FOLDER", "-o", "OUT")(folder)
    except SystemExit as end:
        if end.code:
            raise
    page = (folder.parent / "out" / "index.html").read_text(encoding="utf-8")
    print(
        re.sub(
            r"\d{4}-\d\d-\d\d( \d\d:\d\d(:\d\d)?)?|nonce[-=\"]+[\w+/=-]+|sha256-[\w+/=]+", "", page
        )
    )


def _answers(folder: Path) -> None:
    """All answers, as the next run would use them, and one more written."""
    from sparsemm_eval.engine.answers import Answer, AnswerStore, tally

    _, broken = tally(folder / "answers" / "qwen2vl")
    print(*broken.items())
    store = AnswerStore(folder / "answers" / "qwen2vl")
    known = json.loads((folder.parent / "pristine" / "answers.json").read_text())
    for cell, answers in known.items():
        read = store.read(cell)
        for key, answer in read.items():
            if answers.get(key) != [answer.task, answer.doc_id, answer.text, dict(answer.record)]:
                raise AssertionError(f"an answer that nobody wrote: {cell} {answer}")
    store.write([Answer("new", "cell", "t", "d 1", "text")])
    if store.read("cell")["new"].text != "text":
        raise AssertionError("what was written is not read")


def _resumed(folder: Path) -> None:
    """The sweep run on: its tables, byte for byte but for divergences.

    Those are measured where full KV is computed beside; of an answer that is computed again alone
    there is none, and the table states of how many the mean is.
    """
    grid = folder.parent / "pristine" / "grid.yaml"
    for name in ("table.md", "kept.md"):
        (folder / name).unlink(missing_ok=True)
    try:
        _command("sweep", str(grid), "-o", "FOLDER")(folder)
    except SystemExit as end:
        if end.code:
            raise
    sys.stdout.flush()
    os.ftruncate(1, 0)
    os.lseek(1, 0, os.SEEK_SET)
    for name in ("table.md", "kept.md"):
        text = (folder / name).read_text(encoding="utf-8")
        text = re.sub(r"\d\.\d\de[+-]\d\d( \(n=\d\))?", "KL", text)
        print(re.sub(r"[ -]+", " ", text))  # columns are as wide as what stands in them


def _scores(folder: Path) -> None:
    from sparsemm_eval.methods import HeadScores

    print(HeadScores.read(folder / "head_scores.json").digest)


def _pages(folder: Path) -> None:
    """Pages of a chase, as it would go on from them."""
    from sparsemm_eval.heads.visual_scores import PageRecords

    path = folder / "a.pages.jsonl"
    known = json.loads((folder.parent / "pristine" / "pages.json").read_text())
    for page in PageRecords(path, PAGE_SETTINGS).done:
        if [page.digest, page.answer_tokens, page.scores.tolist()] not in known:
            raise AssertionError(f"a page that nobody wrote: {page}")


def _sensitivity(folder: Path) -> None:
    """A sensitivity file, as a method and as head scores."""
    from sparsemm_eval.methods import Sensitivity

    found = Sensitivity.read(folder / "a.json")
    print(found.digest, found.head_scores("share+one").digest)


def _records(folder: Path) -> None:
    """Records of a sensitivity, as it would go on from them."""
    from sparsemm_eval.heads.sensitivity import Records

    known = json.loads((folder.parent / "pristine" / "records.json").read_text())
    records = Records(folder / "a.records.jsonl", PAGE_SETTINGS)
    for (prompt, asked), found in records._known.items():
        if [prompt, asked, found] not in known:
            raise AssertionError(f"a record that nobody wrote: {prompt} {asked} {found}")


def _questions(folder: Path) -> None:
    """Questions of one's own, read as calibration reads them."""
    from sparsemm_eval.heads.calibration import read_calibration

    for source in read_calibration(str(folder / "asked.jsonl"), 5).sources:
        for request in source.requests:
            for part in request.messages(request.documents[request.number])[0]["content"]:
                shown = part.get("text") or hash(part["url"].tobytes())
                print(source.kind, request.document, shown)


PAGE_SETTINGS = {"schema": 1, "checkpoint": "c" * 64, "data": "drawn"}


def _checkpoint(folder: Path) -> None:
    """One answer of a checkpoint: another than the undamaged one's under the same hash is wrong."""
    from sparsemm_eval.engine.checkpoint import Checkpoint
    from sparsemm_eval.engine.lmms import make_runner
    from sparsemm_eval.engine.requests import Request

    checkpoint = Checkpoint(folder, "qwen2_vl", dtype="float32")
    with tempfile.TemporaryDirectory() as answers:
        runner = make_runner(checkpoint, [{"method": "fullkv"}], answers)
        image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
        content = [{"type": "image", "url": image}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": content}]
        request = Request("t", "test 0", [None], 0, lambda _: messages, {"max_new_tokens": 4})
        (answered,) = runner.answer([request])
        for failure in answered.failed:
            print(f"failed: {failure.error}")
        for answer in answered.answers:
            print(answer.text)
    pristine = Checkpoint(folder.parent / "pristine" / "checkpoint", "qwen2_vl")
    if checkpoint.hash != pristine.hash:
        print(*(path.name for path in folder.iterdir()), "are known to be other files")


def _picture(folder: Path) -> None:
    """A picture as a sample's: its pixels, or the sample's failure."""
    from sparsemm_eval.engine.requests import read_chat
    from sparsemm_eval.families import Family

    class Processor:
        def apply_chat_template(self, *_: object, **__: object) -> str:
            return ""

    path = folder / f"a.{folder.name}"
    content = [{"type": "image", "url": str(path)}]
    try:
        messages = [{"role": "user", "content": content}]
        (image,) = read_chat(Processor(), messages, Family()).visuals
        print(image.mode, image.size, hash(image.convert("RGB").tobytes()))
    except Exception as error:  # noqa: BLE001 each is a failed sample
        print(f"{path.name} failed: {error!r}")


def _drawn(folder: Path) -> None:
    """A drawn benchmark as it is used: all its files, as they were drawn."""
    from sparsemm_eval.tiny.benchmarks import build

    built = build("vqav2", folder, samples=2)
    pristine = folder.parent / "pristine" / "drawn" / built.name
    for path in sorted(path for path in built.rglob("*") if path.is_file()):
        if pristine.is_dir():
            assert path.read_bytes() == (pristine / path.relative_to(built)).read_bytes()


def _op(folder: Path) -> None:
    """The compiled op, loaded or built again."""
    import torch

    from sparsemm_eval.cache.extension import load_extension

    os.environ["TORCH_HOME"] = str(folder)
    load_extension("cpu")
    print(torch.ops.sparsemm.append_attend)


# --- folders -------------------------------------------------------------------------------------


def _made(pristine: Path) -> int:
    """Make all folders; the exit code."""
    pristine.mkdir()
    try:
        _made_sweep(pristine)
        _made_others(pristine)
    except BaseException:  # noqa: BLE001 it is shown, and ends the parent
        traceback.print_exc()
        shutil.rmtree(pristine)
        return 1
    return 0


def _made_sweep(pristine: Path) -> None:
    """A finished sweep, submitted as jobs, with what Slurm would have left beside it."""
    from sparsemm_eval.engine.answers import AnswerStore
    from sparsemm_eval.sweep.state import write_ids

    grid = pristine / "grid.yaml"
    grid.write_text(GRID)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    out = pristine / "sweep"
    command = [sys.executable, "-m", "sparsemm_eval", "submit", str(grid), "-o", str(out)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    write_ids(out, {"qwen2vl@vqav2_mini": "12_3"})
    store = AnswerStore(out / "answers" / "qwen2vl")
    plan = json.loads((out / "plan.json").read_text())
    known = {
        cell["words"]: {
            key: [answer.task, answer.doc_id, answer.text, dict(answer.record)]
            for key, answer in store.read(cell["words"]).items()
        }
        for cell in plan["cells"]
    }
    (pristine / "answers.json").write_text(json.dumps(known))


def _made_others(pristine: Path) -> None:
    """Head scores, pages of a chase, sensitivity and its questions, an efficiency file, a
    checkpoint, pictures, lmms-eval's.
    """
    from sparsemm_eval.heads.sensitivity import Records
    from sparsemm_eval.heads.visual_scores import PageRecords, PageScore
    from sparsemm_eval.methods import HeadScores, ModelShape, Sensitivity
    from sparsemm_eval.methods.head_scores import provenance_file
    from sparsemm_eval.methods.sensitivity import Kind
    from sparsemm_eval.tiny import find_checkpoint

    made = np.random.default_rng(0)
    places = ("scores", "pages", "efficiency", "grid", "png", "jpeg", "theirs", "sensitivity")
    for name in (*places, "records", "asked"):
        (pristine / name).mkdir()
    scores = pristine / "scores" / "head_scores.json"
    HeadScores(made.random((4, 4))).write(scores)
    stated = {"scores_sha256": hashlib.sha256(scores.read_bytes()).hexdigest()}
    provenance_file(scores).write_text(json.dumps(stated))
    pages = [PageScore(f"{place:064x}", made.random((4, 4)), place) for place in range(20)]
    PageRecords(pristine / "pages" / "a.pages.jsonl", PAGE_SETTINGS).write(pages)
    known = [[page.digest, page.answer_tokens, page.scores.tolist()] for page in pages]
    (pristine / "pages.json").write_text(json.dumps(known))
    worth, rules = made.random((4, 2)), np.zeros((4, 2), dtype=np.int64)
    kinds = {name: Kind(worth, 2, 9, ("a" * 64, "b" * 64)) for name in ("one", "two")}
    found = Sensitivity(ModelShape(4, 4, 2), 8, kinds, rules, {16: rules + 16})
    found.write(pristine / "sensitivity" / "a.json")
    records = Records(pristine / "records" / "a.records.jsonl", PAGE_SETTINGS)
    for place in range(20):
        records.write(f"{place:064x} 64", f"{place:064x}", made.random(3).tolist())
    known = [[*at, found] for at, found in records._known.items()]
    (pristine / "records.json").write_text(json.dumps(known))
    lines = [{"question": "What is it?", "image": "a.png"}, {"question": "1 + 1?", "kind": "sums"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (pristine / "asked" / "asked.jsonl").write_text(text)
    Image.fromarray(made.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(
        pristine / "asked" / "a.png"
    )
    root = Path(__file__).parent.parent.parent
    shutil.copy(root / "results/efficiency/amd-epyc.json", pristine / "efficiency")
    shutil.copy(pristine / "grid.yaml", pristine / "grid")
    picture = Image.fromarray(made.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    picture.save(pristine / "png" / "a.png")
    picture.save(pristine / "jpeg" / "a.jpeg")
    shutil.copytree(find_checkpoint("embedded:qwen2vl"), pristine / "checkpoint")
    _drawn(pristine / "drawn")
    _op(pristine / "op")
    for path in (pristine / "sweep" / "cells" / "qwen2vl").iterdir():
        if path.name.endswith("_results.json"):  # as lmms-eval itself writes it
            content = json.loads(path.read_text())
            del content["sparsemm_eval"]
            (pristine / "theirs" / path.name).write_text(json.dumps(content))
        else:
            shutil.copy(path, pristine / "theirs")


_TABLE = Look("table", _command("table", "FOLDER"))
_LONG = Look("table --long", _command("table", "FOLDER", "--long"), 0.3)
_LATEX = Look("table latex", _command("table", "FOLDER", "--format", "latex"), 0.3)
_CSV = Look("table csv", _command("table", "FOLDER", "--format", "csv"), 0.2)
_FIGURE = Look("figure", _command("figure", "FOLDER", "-o", "OUT", "--format", "svg"), 0.2)
_SWEEP_LOOKS = (
    Look("status", _command("status", "FOLDER")),
    _TABLE, _LONG, _LATEX, _FIGURE,
    Look("report", _page, 0.3),
    Look("cancel", _command("cancel", "FOLDER"), 0.2),
    Look("merge", _command("merge", "FOLDER", "-o", "OUT"), 0.3),
    Look("sweep", _resumed, 0.15, final=True),
)  # fmt: skip
TARGETS = (
    Target("answers", ("answers/*/*.sqlite",), (*_SWEEP_LOOKS[:1], Look("answers", _answers),
           Look("merge", _command("merge", "FOLDER", "-o", "OUT"), 0.3),
           Look("sweep", _resumed, 0.15, final=True)), weight=6),
    Target("results and samples", ("cells/*/*",), _SWEEP_LOOKS, weight=4),
    Target("plan, grid, jobs, locks",
           ("plan.json", "grid.yaml", "jobs/*.json", "jobs/*/*.json", "jobs/*.log", "locks/*"),
           _SWEEP_LOOKS, weight=4),
    Target("results of lmms-eval", ("*",), (_TABLE, _LONG, _LATEX, _CSV, _FIGURE,
           Look("report", _page, 0.3)), exact=False, weight=2),
    Target("head scores", ("*",), (Look("read", _scores), Look("figure", _command(
           "figure", "--kind", "heads", "--head-scores", "FOLDER/head_scores.json", "--kv-heads",
           "2", "--budgets", "64", "-o", "OUT", "--format", "svg"), 0.2)), exact=False),
    Target("pages of a chase", ("*",), (Look("read", _pages),)),
    Target("sensitivity", ("*",), (Look("read", _sensitivity),)),
    Target("records of a sensitivity", ("*",), (Look("read", _records),)),
    Target("questions", ("*",), (Look("read", _questions),), exact=False),
    Target("efficiency", ("*",), (Look("figure", _command(
           "figure", "FOLDER", "--kind", "efficiency", "-o", "OUT", "--format", "svg"), 0.5),
           ), exact=False),
    Target("grid", ("*",), (Look("dry run", _command("sweep", "FOLDER/grid.yaml", "--dry-run")),),
           exact=False),
    Target("checkpoint", ("*",), (Look("answer", _checkpoint),), weight=2),
    Target("drawn benchmark", ("*/*", "*/*/*"), (Look("use", _drawn),), exact=False),
    Target("compiled op", ("*/*/*",), (Look("load", _op),), exact=False, weight=0.2),
    Target("pictures", ("*",), (Look("read", _picture),), exact=False),
)  # fmt: skip
_PLACES = {
    "answers": "sweep", "results and samples": "sweep", "plan, grid, jobs, locks": "sweep",
    "results of lmms-eval": "theirs", "head scores": "scores", "pages of a chase": "pages",
    "sensitivity": "sensitivity", "records of a sensitivity": "records", "questions": "asked",
    "efficiency": "efficiency", "grid": "grid", "checkpoint": "checkpoint",
    "drawn benchmark": "drawn", "compiled op": "op",
}  # fmt: skip


# --- one case ------------------------------------------------------------------------------------


def look(run: Callable[[Path], None], folder: Path) -> Seen:
    """Run in a process of its own, within time and memory."""
    said = folder.parent / "said.txt"
    child = os.fork()
    if child == 0:
        os._exit(_in_child(run, folder, said))
    end = time.monotonic() + PATIENCE
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Seen(-9, said.read_text(errors="replace"), f"did not end in {PATIENCE} s")
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(status)
    text = said.read_text(errors="replace")
    if used.ru_maxrss * 1024 > MEMORY:
        return Seen(code, text, f"took {used.ru_maxrss >> 20} GiB")
    if code < 0:
        return Seen(code, text, f"ended by {signal.Signals(-code).name}")
    if code not in (0, 1, 2) or _TRACEBACK in text:
        return Seen(code, text, "a traceback")
    if code and _SENTENCE not in text and "Error" not in text:
        return Seen(code, text, f"exit code {code} without a sentence")
    return Seen(code, text)


def _in_child(run: Callable[[Path], None], folder: Path, said: Path) -> int:
    from sparsemm_eval.cli.common import one_sentence

    out = os.open(said, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(folder.parent)
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{message}")
    try:
        with one_sentence():
            run(folder)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # noqa: BLE001 typer's way to end, or a fault to be seen
        code = getattr(error, "exit_code", 3)
        if code == 3:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


class Fuzz:
    """Undamaged folders, and what all looks see in them.

    Parameters
    ----------
    work : Path
        An empty folder, for damaged copies.
    pristine : Path
        Undamaged folders; made if it is not there.
    """

    def __init__(self, work: Path, pristine: Path) -> None:
        self.work, self.pristine = work, pristine
        self.expected: dict[tuple[str, str], Seen] = {}
        if not pristine.is_dir():
            # In a process of its own: threads do not live through a fork.
            child = os.fork()
            if child == 0:
                os._exit(_made(pristine))
            assert os.waitpid(child, 0)[1] == 0
        for target in TARGETS:
            for one in target.looks:
                for place in _places(target):
                    seen = look(one.run, self._copy(place))
                    assert (seen.code, seen.fault) == (0, ""), (target.name, one.name, seen)
                    self.expected[place, one.name] = self._plain(seen)

    def case(self, name: str) -> tuple[Target, dict[str, Any], list[tuple[str, str, Seen]]]:
        """Run one case.

        Parameters
        ----------
        name : str
            SEED/NUMBER: all that is random comes from it.

        Returns
        -------
        Target, what was damaged and how, and of each look its verdict and what was seen.
        """
        chance = random.Random(name)
        target = chance.choices(TARGETS, [one.weight for one in TARGETS])[0]
        place = chance.choice(_places(target))
        folder = self._copy(place)
        files = sorted({p for pattern in target.files for p in folder.glob(pattern) if p.is_file()})
        path = chance.choice(files)
        way = chance.choices(["bytes", "values", "kind"], [6, 4, 1])[0]
        how = damage_values(path, chance) if way == "values" else None
        if how is None:
            way = "kind" if way == "kind" else "bytes"
            how = (damage_kind if way == "kind" else damage_bytes)(path, chance)
        # An empty file of answers is what a process leaves that was killed as it began one.
        empty = path.suffix == ".sqlite" and path.is_file() and not path.stat().st_size
        exact = target.exact and way == "bytes" and not empty
        about = {"case": name, "file": str(path.relative_to(folder.parent)), "damage": how}
        seen = []
        for one in target.looks:
            if chance.random() < one.share:
                done = self._plain(look(one.run, folder))
                expected = self.expected[place, one.name]
                # Once a command has named it, what it held may be missing from the next.
                named = any(verdict == "named" for _, verdict, _ in seen) and not one.final
                exact_now = exact and not named
                seen.append((one.name, _verdict(done, expected, path, exact_now), done))
        return target, about, seen

    def _copy(self, place: str) -> Path:
        shutil.rmtree(self.work / "now", ignore_errors=True)
        (self.work / "now").mkdir()
        (self.work / "now" / "pristine").symlink_to(self.pristine)
        shutil.copytree(self.pristine / place, self.work / "now" / place)
        return self.work / "now" / place

    def _plain(self, seen: Seen) -> Seen:
        """Without bars, and without what differs from run to run."""
        lines = [line.split("\r")[-1] for line in seen.text.split("\n") if "%|" not in line]
        text = re.sub(r"\d+(\.\d+)? (seconds|s)\b|answers-\d+-", "", "\n".join(lines))
        return Seen(seen.code, text, seen.fault)


def _places(target: Target) -> list[str]:
    return [_PLACES[target.name]] if target.name in _PLACES else ["png", "jpeg"]


def _verdict(seen: Seen, expected: Seen, path: Path, exact: bool) -> str:
    if seen.fault:
        return "crashed"
    if seen.code:
        return "refused"
    if seen.text == expected.text:
        return "same"
    stem = path.name.split("_results")[0].split("_samples")[0]
    named = stem in seen.text or re.sub(r"answers-\d+-", "", path.name) in seen.text
    return "named" if named or not exact else "wrong"


# --- all cases -----------------------------------------------------------------------------------


def run_cases(fuzz: Fuzz, seed: int, minutes: float, shown: bool = True) -> Outcome:
    """Run cases until the time is over."""
    end = time.monotonic() + 60 * minutes
    outcome = Outcome()
    number = 0
    while time.monotonic() < end:
        target, about, seen = fuzz.case(f"{seed}/{number}")
        number += 1
        tallied = outcome.by_target.setdefault(target.name, Tallied())
        tallied.cases += 1
        verdicts = Counter(verdict for _, verdict, _ in seen)
        worst = next((v for v in ("wrong", "crashed", "refused", "named") if verdicts[v]), "same")
        setattr(tallied, worst, getattr(tallied, worst) + 1)
        for name, verdict, done in seen:
            if verdict in ("wrong", "crashed"):
                fault = {**about, "look": name, "verdict": verdict, "fault": done.fault}
                said = re.sub(r"(/[\w.+-]+)+/(now|site-packages|sparsemm_eval)/", "…/", done.text)
                outcome.faults.append({**fault, "said": said[-_SHOWN:]})
                if shown:
                    print(json.dumps(fault), flush=True)
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cases; exit code 1 if one was wrong or crashed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", nargs="+", help="SEED/NUMBER: only these, with all they say")
    parser.add_argument("--out", type=Path, help="JSON file for the outcome")
    parser.add_argument("--pristine", type=Path, help="undamaged folders, kept for the next run")
    given = parser.parse_args(arguments)
    # Of the beginning: a checkout may go on while this runs.
    made = provenance(shlex.join(["python", *sys.argv]))
    import sparsemm_eval.engine.lmms
    import sparsemm_eval.report.figures
    import sparsemm_eval.sweep.sweep  # noqa: F401  once, for all children

    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder), (given.pristine or Path(folder) / "pristine").resolve())
        for case in given.case or ():
            target, about, seen = fuzz.case(case)
            print(json.dumps({"target": target.name, **about}))
            for name, verdict, done in seen:
                print(f"--- {name}: {verdict} (exit code {done.code}) {done.fault}\n{done.text}")
        if given.case:
            return 0
        outcome = run_cases(fuzz, given.seed, given.minutes)
    bad = 0
    for name, tallied in outcome.by_target.items():
        print(name, vars(tallied))
        bad += tallied.wrong + tallied.crashed
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        by_target = {name: vars(tallied) for name, tallied in outcome.by_target.items()}
        content = {**made, "minutes": given.minutes, "seed": given.seed}
        content |= {"targets": by_target, "faults": outcome.faults}
        given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
