"""``python -m sparsemm_eval``: the command line, where torchrun or a batch job begins it."""

from sparsemm_eval.cli import app

app()
