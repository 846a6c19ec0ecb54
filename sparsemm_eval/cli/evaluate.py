"""lmms-eval's own command line, with this package's tasks and an honest exit code."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stderr
from typing import Any, TextIO

import typer

from sparsemm_eval.cli import common
from sparsemm_eval.cli.common import one_sentence
from sparsemm_eval.engine.manifest import MODELS
from sparsemm_eval.errors import UserError, one_line

app = typer.Typer()

# Options of lmms-eval that say nothing to our models, and why.
_WITHOUT_MEANING = {
    "--apply_chat_template": "all prompts go through the checkpoint's own chat template anyway",
    "--cache_requests": "lmms-eval's cache forgets how a document is put as messages, and finished "
    "answers are kept anyway",
    "--fewshot_as_multiturn": "lmms-eval puts no examples into the messages of a chat model",
    "--system_instruction": "lmms-eval leaves it out of the messages of a chat model; give "
    "system_prompt=TEXT in --model_args",
}
# What lmms-eval says where nobody would guess the cause, and the cause.
_IN_OUR_WORDS = {
    "Currently messages is used for generation only": "one of the tasks is none that lmms-eval "
    "puts to chat models: add --force_simple where it gives choices to be scored (output_type "
    "multiple_choice or loglikelihood), else leave it out",
    "has no attribute 'sampler'": "--num_fewshot: one of the tasks has no examples to give (no "
    "fewshot_config); leave it out, or choose other tasks",
}


@app.command(
    name="eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def evaluate(context: typer.Context) -> None:
    """Run `python -m lmms_eval ARGS` with our tasks; the exit code is 1 if the run failed."""
    with one_sentence("answers of this package's models are safe, run it again to go on"):
        _check_said(context.args)
        from sparsemm_eval.libraries import check_libraries

        check_libraries()
        failure = _run(context.args)
    if failure:
        typer.echo(f"sparsemm-eval: {failure}", err=True)
        raise typer.Exit(1)


def _check_said(arguments: list[str]) -> None:
    """Refuse what lmms-eval takes: a model of its own by default, no tasks until the end, and
    options that our models would not heed.
    """
    said = [word.partition("=")[0] for word in arguments]
    if {"-h", "--help", "--config", "--power_analysis"} & set(said):
        return
    if not any(word.startswith("--task") for word in said):
        raise UserError("--tasks is missing: give some, such as --tasks docvqa_mini, or list")
    listed = any(word.removeprefix("--tasks=").startswith("list") for word in arguments)
    if "--model" not in said and not listed:
        raise UserError("--model is missing: give one, such as --model sparsemm")
    theirs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    theirs.add_argument("--model")
    theirs.add_argument("--tasks", default="")
    theirs.add_argument("--include_path", action="append", default=[])
    given = theirs.parse_known_args(arguments)[0]
    if given.model in MODELS:
        for option in said:
            if option in _WITHOUT_MEANING:
                raise UserError(f"{option}: {_WITHOUT_MEANING[option]}; leave it out")
        if given.include_path:
            # Others the model finds by itself, which does not know these folders.
            from sparsemm_eval.engine.tasks import check_kinds

            check_kinds(common.words(given.tasks), given.include_path)


def _run(arguments: list[str]) -> str | None:
    """Run lmms-eval on arguments; what it said of a failure, which its exit code hides."""
    from lmms_eval.__main__ import cli_evaluate
    from loguru import logger

    from sparsemm_eval.paths import tasks_folder

    failures: list[str] = []
    errors: list[str] = []

    def watch(record: Any) -> None:
        # lmms-eval logs what failed, inside its handler, and goes on to a normal end. Its other
        # errors are a task's own and no failure, unless it then leaves without a word.
        if record["message"].startswith("Error during evaluation"):
            error = sys.exc_info()[1]
            words = one_line(error) if error else record["message"]
            failures.append(next((_IN_OUR_WORDS[x] for x in _IN_OUR_WORDS if x in words), words))
        elif record["level"].name == "ERROR":
            errors.append(record["message"])

    theirs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    theirs.add_argument("--include_path", action="append", default=[])
    theirs.add_argument("--verbosity")
    given, rest = theirs.parse_known_args(arguments)
    if given.verbosity is not None:
        # What failed is known by an error in the log, which must not be left out.
        rest += ["--verbosity", "ERROR" if given.verbosity == "CRITICAL" else given.verbosity]
    folders = [str(tasks_folder()), *given.include_path]
    before = sys.argv
    sys.argv = ["lmms_eval", *rest]
    logger.configure(patcher=watch)
    try:
        with redirect_stderr(_WithoutTracebacks(sys.stderr)):
            cli_evaluate(argparse.Namespace(include_path=folders))
    except SystemExit as end:
        if end.code or not errors:
            raise
        failures += errors[-1:]
    finally:
        sys.argv = before
        logger.configure(patcher=lambda record: None)
    return failures[0] if failures else None


class _WithoutTracebacks:
    """Standard error while lmms-eval runs, which prints a traceback of all that fails.

    What is written while an error is handled that the user can mend is left out, unless ``--debug``
    asks for it: its sentence follows.

    Parameters
    ----------
    stream : TextIO
        Where the rest goes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        from sparsemm_eval.engine.answers import SampleFailures

        mended = isinstance(sys.exc_info()[1], UserError | SampleFailures)
        if mended and not common.debug:
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
