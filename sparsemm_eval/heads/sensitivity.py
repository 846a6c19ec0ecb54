"""Head scores without labels: starve KV heads, and watch the next-token distribution move.

First each head alone is starved, which tells what it is worth to each kind of prompts. Then heads
exchange tokens, starting from these worths at a budget itself: whoever gains most from more tokens
gets them from whoever loses least; and each head chooses the rule by which it ranks a prompt's
tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from loguru import logger
from tqdm import tqdm

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.requests import model_inputs, to_model
from sparsemm_eval.errors import UserError, check_int, one_line
from sparsemm_eval.heads.starved import AnsweredPrompt, room
from sparsemm_eval.methods import ModelShape, Sensitivity
from sparsemm_eval.methods.allocation import share_out
from sparsemm_eval.methods.sensitivity import NEWEST, RECENT, RULES, Kind
from sparsemm_eval.paths import write_whole
from sparsemm_eval.stored import NotUnderstood, checked, parse_json, read_bytes, with_checksum

if TYPE_CHECKING:
    from sparsemm_eval.heads.calibration import CalibrationPrompt

# Layers that lose less than this share of what the worst layer loses, where all their heads are
# starved at once, are not looked into.
NOTHING = 1e-3
# Two halves of the prompts that give so much of a budget to the same heads have settled.
SETTLED = 0.95
# Nats that are rounding.
_NOISE = 1e-6
# Prompts of each kind at least before they may.
_LEAST_PROMPTS = 4
# Of an exchange: nats that one token counts at most, and what a divergence is measured beside.
_CLAMP, _BESIDE = 4.0, 0.02
# Tokens that are exchanged, as shares of the budget, from coarse to fine; rounds of each.
_STEPS, _ROUNDS = (1.5, 1.0, 0.75, 0.5, 0.25, 0.125), 2
# An exchange or a rule must better the objective by so much.
_WORTH, _RATIO = 3e-3, 1.05
# Share of a budget that each head has in the beginning.
_FLOOR = 0.1
_MOST_BYTES = 1 << 31  # of records


def measure(
    checkpoint: Checkpoint,
    prompts: Iterable[CalibrationPrompt],
    total: int | None = None,
    *,
    window: int = 32,
    budgets: Sequence[int] = (64, 32, 16),
    records: Path | None = None,
    nothing: float = NOTHING,
) -> Sensitivity:
    """Measure what a model loses where KV heads keep less, and what they are best given.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model.
    prompts : iterable of CalibrationPrompt
        Kind by kind in turns, so that an early end has seen every kind.
    total : int, optional
        How many there are, for the progress bar.
    window : int
        Queries that observe a prompt, and the newest tokens that a starved head keeps.
    budgets : sequence of int
        For which tables of tokens are searched; none leaves it at the divergences.
    records : Path, optional
        Where everything is kept as soon as it was computed; what is found there is not computed
        again.
    nothing : float
        Share of the worst layer's loss below which a layer's heads are not looked into one by one;
        0 looks into all.

    Raises
    ------
    UserError
        In one sentence, if there is no prompt, no answer has a second token, or records are of
        another measurement.
    """
    check_int("window", window, least=1)
    for budget in budgets:
        check_int("budget", budget, least=2)
    settings = {"checkpoint": checkpoint.hash, "dtype": checkpoint.dtype, "window": window}
    rows = _Rows(checkpoint, window, Records(records, settings))
    divergences = _starve(rows, prompts, total, nothing)
    kinds = {
        kind: Kind(
            np.mean([divergences[prompt.digest] for prompt in asked], 0),
            len(asked),
            sum(len(rows.answer(prompt)) - 1 for prompt in asked),
            tuple(prompt.digest for prompt in asked),
        )
        for kind, asked in rows.by_kind().items()
    }
    shape = checkpoint.shape
    rules = np.zeros((shape.layers, shape.kv_heads), dtype=np.int64)
    plain = Sensitivity(shape, window, kinds, rules)
    share = plain.share()
    tables: dict[int, np.ndarray] = {}
    for budget in sorted(set(budgets)):
        starts = [_table(_FLOOR / share.size + (1 - _FLOOR) * share, budget)]
        if tables:
            known = tables[max(tables)]
            starts.append(_table((known - 1) / (known - 1).sum(), budget))
        # Rules are chosen where they matter most: at the smallest budget.
        search = _Search(rows, rules, _best(rows, rules, starts), choose_rules=not tables)
        search.run(budget)
        rules, tables[budget] = search.rules, search.counts
    return Sensitivity(shape, window, kinds, rules, tables)


def _starve(
    rows: _Rows, prompts: Iterable[CalibrationPrompt], total: int | None, nothing: float
) -> dict[str, np.ndarray]:
    """What each prompt loses by starving each head alone, [L, H] by its digest."""
    shape = rows.shape
    whole = np.full((shape.layers, shape.kv_heads), 1 << 30)
    layers = np.repeat(whole[None], shape.layers, 0)
    layers[np.arange(shape.layers), np.arange(shape.layers)] = rows.window
    newest = np.full_like(whole, NEWEST)
    found: dict[str, np.ndarray] = {}
    for prompt in tqdm(prompts, total=total, desc="starving heads", leave=False):
        if prompt.digest in found:
            continue
        rows.add(prompt)
        lost = np.zeros(whole.shape)
        if len(rows.answer(prompt)) > 1:
            of_layers = rows.mean(prompt, newest, layers)
            worth = np.flatnonzero(of_layers >= nothing * of_layers.max())
            heads = [(layer, head) for layer in worth for head in range(shape.kv_heads)]
            alone = np.repeat(whole[None], len(heads), 0)
            for row, head in enumerate(heads):
                alone[(row, *head)] = rows.window
            lost[tuple(np.array(heads).T)] = rows.mean(prompt, newest, alone)
        found[prompt.digest] = lost
        if _settled(rows, found):
            logger.info(f"the scores have settled after {len(found)} prompts")
            break
    if not found:
        raise UserError("no prompts to calibrate on: give at least 1")
    if max(lost.max() for lost in found.values()) < _NOISE:
        raise UserError(
            f"{rows.checkpoint.pretrained} loses nothing on any of {len(found)} prompts where a "
            f"head keeps only the {rows.window} newest tokens: give prompts of more tokens whose "
            "answers have more than one, or a smaller window"
        )
    return found


def _settled(rows: _Rows, found: dict[str, np.ndarray]) -> bool:
    """Whether two halves of the prompts would give most of a budget to the same heads."""
    kinds = list(rows.by_kind().values())
    each = len(kinds[-1])
    if each < _LEAST_PROMPTS or any(len(asked) != each for asked in kinds):
        return False
    halves = [
        [_root(np.mean([found[prompt.digest] for prompt in asked[half::2]], 0)) for asked in kinds]
        for half in (0, 1)
    ]
    one, other = (np.mean(shares, 0) for shares in halves)
    return 1 - np.abs(one - other).sum() / 2 >= SETTLED


def _root(divergence: np.ndarray) -> np.ndarray:
    rooted = np.sqrt(divergence)
    return rooted / (rooted.sum() or 1)


def _table(share: np.ndarray, budget: int) -> np.ndarray:
    """Tokens by shares, each head one at least."""
    wants = share.ravel() * (budget - 1) * share.size
    return 1 + share_out(wants, 1 << 30, (budget - 1) * share.size).reshape(share.shape)


def _best(rows: _Rows, rules: np.ndarray, tables: Sequence[np.ndarray]) -> np.ndarray:
    if len(tables) == 1:
        return tables[0]
    counts = np.stack(tables)
    return tables[int(np.argmin(rows.objective(np.stack([rules] * len(tables)), counts)))]


class _Search:
    """A table of tokens that is bettered by exchanges, at a budget that stays.

    Parameters
    ----------
    rows : _Rows
        What is asked how good a table is.
    rules, counts : ndarray
        [L, H], where it begins.
    choose_rules : bool
        Whether heads may also take another rule.
    """

    def __init__(
        self, rows: _Rows, rules: np.ndarray, counts: np.ndarray, choose_rules: bool
    ) -> None:
        self.rows, self.choose_rules = rows, choose_rules
        self.rules, self.counts = rules, counts
        # Heads that change in one round at most: a few, as what they gain does not add up.
        self.most = max(3, rules.size // 7)

    def run(self, budget: int) -> None:
        """Exchange tokens, from many to few, until that betters nothing."""
        steps = [max(1, round(step * budget)) for step in _STEPS]
        total = len(steps) * (_ROUNDS + self.choose_rules)
        with tqdm(total=total, desc=f"searching {budget} tokens a head", leave=False) as progress:
            for step in dict.fromkeys(steps):
                if self.choose_rules:
                    self._choose_rules()
                    progress.update()
                for _ in range(_ROUNDS):
                    progress.update()
                    if not self._exchange(step):
                        break

    def _choose_rules(self) -> None:
        """Let heads that see enough for a rule to matter take others."""
        heads = np.argwhere(self.counts >= RECENT + 2)
        tried = [
            (tuple(head), rule)
            for head in heads
            for rule in range(len(RULES))
            if rule != self.rules[tuple(head)]
        ]
        if not tried:
            return
        rules = np.repeat(self.rules[None], 1 + len(tried), 0)
        for row, (head, rule) in enumerate(tried, 1):
            rules[(row, *head)] = rule
        found = self._objective(rules, None)
        best: dict[tuple[int, ...], tuple[float, int]] = {}
        for (head, rule), value in zip(tried, found[1:], strict=True):
            if value < found[0] - _WORTH and value < best.get(head, (np.inf, 0))[0]:
                best[head] = (value, rule)
        chosen, now = [self.rules], self.rules
        for head in sorted(best, key=lambda head: best[head][0])[: 2 * self.most]:
            now = now.copy()
            now[head] = best[head][1]
            chosen.append(now)
        self.rules = chosen[int(np.argmin(self._objective(np.stack(chosen), None)))]

    def _exchange(self, step: int) -> bool:
        """Move tokens from heads that lose least to heads that gain most; whether any moved."""
        size = self.counts.size
        changed = np.repeat(self.counts.reshape(1, -1), 1 + 2 * size, 0)
        heads = np.arange(size)
        changed[1 + heads, heads] += step
        changed[1 + size + heads, heads] -= step
        spares = changed[1 + size + heads, heads] >= 1
        rows = np.concatenate([np.ones(1 + size, dtype=bool), spares])
        found = np.full(len(changed), np.inf)
        found[rows] = self._objective(None, changed[rows].reshape(-1, *self.counts.shape))
        gain, loss = found[0] - found[1 : 1 + size], found[1 + size :] - found[0]
        tables, now, used = [self.counts], self.counts.ravel(), set()
        for _ in range(self.most):
            to = next((head for head in np.argsort(-gain) if head not in used), None)
            others = (head for head in np.argsort(loss) if head not in used and head != to)
            of = next(others, None)
            if to is None or of is None or gain[to] <= max(0, _RATIO * loss[of]):
                break
            now = now.copy()
            now[to] += step
            now[of] -= step
            used |= {to, of}
            tables.append(now.reshape(self.counts.shape))
        if len(tables) == 1:
            return False
        # Each alone was worth it; together they need not be.
        best = int(np.argmin(self._objective(None, np.stack(tables))))
        self.counts = tables[best]
        return best > 0

    def _objective(self, rules: np.ndarray | None, counts: np.ndarray | None) -> np.ndarray:
        many = len(rules if rules is not None else counts)
        rules = np.repeat(self.rules[None], many, 0) if rules is None else rules
        counts = np.repeat(self.counts[None], many, 0) if counts is None else counts
        return self.rows.objective(rules, counts)


class _Rows:
    """What rows lose, from disk where it is there already; prompts are held as memory allows."""

    def __init__(self, checkpoint: Checkpoint, window: int, records: Records) -> None:
        self.checkpoint, self.window, self.records = checkpoint, window, records
        self.shape: ModelShape = checkpoint.shape
        self.prompts: dict[str, CalibrationPrompt] = {}
        self.held: dict[str, AnsweredPrompt] = {}
        self.room: float | None = None

    def add(self, prompt: CalibrationPrompt) -> None:
        """Take a prompt into account from now on."""
        self.prompts[prompt.digest] = prompt

    def by_kind(self) -> dict[str, list[CalibrationPrompt]]:
        """The prompts so far, by kind."""
        kinds: dict[str, list[CalibrationPrompt]] = {}
        for prompt in self.prompts.values():
            kinds.setdefault(prompt.kind, []).append(prompt)
        return kinds

    def answer(self, prompt: CalibrationPrompt) -> list[int]:
        """Tokens of the answer on the whole cache."""
        known = self.records.find(_place(prompt), "answer")
        if known is None:
            known = self._read(prompt).answer
            self.records.write(_place(prompt), "answer", known)
        return known

    def mean(
        self,
        prompt: CalibrationPrompt,
        rules: np.ndarray,
        counts: np.ndarray,
        clamp: float | None = None,
    ) -> np.ndarray:
        """What rows lose of a prompt a token, [rows] in nats; rules [L, H] serve all rows."""
        rules = np.broadcast_to(rules, counts.shape)
        asked = hashlib.sha256(np.stack([rules, counts]).astype("<i8").tobytes())
        asked.update(str(clamp).encode())
        known = self.records.find(_place(prompt), asked.hexdigest())
        if known is None:
            each = self._read(prompt).divergence(rules.copy(), counts)
            known = each.clip(max=clamp).mean(1).tolist()
            self.records.write(_place(prompt), asked.hexdigest(), known)
        return np.array(known)

    def objective(self, rules: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """How bad rows are, [rows]: each kind's loss beside the first row's, mean over kinds."""
        kinds = [
            np.mean(
                [
                    self.mean(prompt, rules, counts, _CLAMP)
                    for prompt in asked
                    if len(self.answer(prompt)) > 1
                ]
                or [np.zeros(len(counts))],
                0,
            )
            for asked in self.by_kind().values()
        ]
        return np.mean([lost / (lost[0] + _BESIDE) for lost in kinds], 0)

    def _read(self, prompt: CalibrationPrompt) -> AnsweredPrompt:
        if prompt.digest in self.held:
            return self.held[prompt.digest]
        checkpoint, model = self.checkpoint, self.checkpoint.model
        family = checkpoint.family()
        processor = family.configure(checkpoint.processor)
        asked = processor, family, [prompt.prompt], [prompt.visuals]
        inputs = to_model(model_inputs(*asked), model)
        known = self.records.find(_place(prompt), "answer")
        read = AnsweredPrompt(model, inputs, self.window, prompt.options, known)
        if self.room is None:
            self.room = room(model)
        if self.room > read.bytes():
            self.room -= read.bytes()
            self.held[prompt.digest] = read
        return read


def _place(prompt: CalibrationPrompt) -> str:
    """What records know a prompt by: its document, and where its answer ends at the latest."""
    return f"{prompt.digest} {prompt.options['max_new_tokens']}"


class Records:
    """A JSONL file of what was computed: its settings, then a line each; a killed run goes on.

    Parameters
    ----------
    path : Path or None
        Read if it is there; made on the first write. None keeps them in memory alone.
    settings : mapping
        All that decides what is computed beside the prompt and what is asked of it.

    Raises
    ------
    UserError
        If the file is of other settings, or broken before its last line; that one may be cut off,
        as a killed run leaves it, and is dropped.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self._known: dict[tuple[str, str], list] = {}
        if path is not None and path.is_file():
            self._load(path)

    def find(self, prompt: str, asked: str) -> list | None:
        """What was computed of a prompt; None if it was not."""
        return self._known.get((prompt, asked))

    def write(self, prompt: str, asked: str, found: list) -> None:
        """Keep it; returns when the system has it."""
        self._known[prompt, asked] = found
        if self.path is None:
            return
        if not self.path.is_file():
            write_whole(self.path, json.dumps(with_checksum(self.settings)) + "\n")
        line = with_checksum({"prompt": prompt, "asked": asked, "found": found})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _load(self, path: Path) -> None:
        try:
            text = read_bytes(path, _MOST_BYTES)
            whole = text[: text.rfind(b"\n") + 1]
            lines = whole.decode("utf-8", errors="replace").splitlines()
            rows = [checked(parse_json(line)) for line in lines]
            known = {(row["prompt"], row["asked"]): row["found"] for row in islice(rows, 1, None)}
        except (NotUnderstood, LookupError, TypeError) as error:
            raise UserError(
                f"{path}: not the records of a sensitivity ({one_line(error)}); move it away to "
                "begin anew"
            ) from error
        if rows and rows[0] != self.settings:
            other = [name for name in self.settings if rows[0].get(name) != self.settings[name]]
            raise UserError(
                f"{path} holds records with another {', '.join(other) or 'setting'}: give another "
                "--output, or move it away to begin anew"
            )
        if whole != text:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        self._known = known
