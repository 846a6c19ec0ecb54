#!/usr/bin/env bash
# A smoke run on the newest version of every package, in an environment that is thrown away: the
# package as a wheel, without the lock, and one small grid. Says in one line what came out; exits 0.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python="$work/venv/bin/python"

smoke() {
  python3 -m venv "$work/venv" &&
    "$python" -m pip install --quiet --disable-pip-version-check --progress-bar off . &&
    HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
      "$work/venv/bin/sparsemm-eval" sweep tests/newest.yaml --out "$work/sweep"
}

if smoke > "$work/log" 2>&1; then
  versions="$("$python" -m pip list --format freeze --disable-pip-version-check 2> /dev/null |
    grep -E '^(torch|transformers|lmms[-_]eval|datasets|filelock)==' | tr '\n' ' ')"
  echo "newest packages: work ($versions)"
else
  echo "newest packages: BROKEN: $(grep -v '^ *$' "$work/log" | tail -n 1 | cut -c1-500)"
fi
exit 0
