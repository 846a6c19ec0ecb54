"""`sparsemm-eval eval`: what lmms-eval would not do with our models is said before it begins."""

import pytest
from typer.testing import CliRunner

from sparsemm_eval.cli import app, evaluate


@pytest.mark.parametrize(
    "option",
    [
        ["--apply_chat_template"],
        ["--cache_requests", "true"],
        ["--cache_requests=true"],
        ["--fewshot_as_multiturn"],
        ["--system_instruction", "Be brief."],
    ],
    ids=str,
)
def test_options_that_say_nothing_are_refused(
    option: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[str]] = []
    monkeypatch.setattr(evaluate, "_run", begun.append)
    monkeypatch.setattr("sparsemm_eval.libraries.check_libraries", lambda: None)
    words = ["eval", "--model", "sparsemm", "--tasks", "docvqa_mini", *option]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert done.output.startswith(f"sparsemm-eval: {option[0].partition('=')[0]}: ")
    assert done.output.count("\n") == 1
    assert begun == []
    # Another model of lmms-eval may heed it.
    words[2] = "llava_hf"
    assert CliRunner().invoke(app, words).exit_code == 0
    assert len(begun) == 1
