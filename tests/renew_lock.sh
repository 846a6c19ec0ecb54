#!/usr/bin/env bash
# Renews requirements.lock to the newest versions that pyproject.toml allows, installs them, and
# runs the tests on them. Arguments go to `uv pip compile`: `--upgrade-package NAME` renews one
# package, `--constraint FILE` holds some back. Commit the lock only if the tests pass.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
upgrade=--upgrade
for argument in "$@"; do
  case "$argument" in --upgrade-package* | -P*) upgrade=--quiet ;; esac
done
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
# One lock for Python 3.10 to 3.14 and for every platform: markers say which package is for which.
"$work/venv/bin/uv" pip compile --quiet --universal --python-version 3.10 --generate-hashes \
  --no-header --no-annotate --extra dev "$upgrade" "$@" pyproject.toml --output-file requirements.lock
git diff --stat -- requirements.lock
./run_eval.sh test
