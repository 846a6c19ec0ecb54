#!/usr/bin/env bash
# The front door. `./run_eval.sh` runs the demo, `./run_eval.sh test` the tests; see usage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'END'
./run_eval.sh                  the demo on the embedded models, offline; tables and a page in results/demo/
./run_eval.sh test [ARGS]      the tests; ARGS go to pytest
./run_eval.sh -- ARGS          python -m lmms_eval ARGS, with our models and tasks known to it
./run_eval.sh COMMAND [ARGS]   any other command of sparsemm-eval (demo, chase, …); --help lists them
The first call makes .venv and installs into it (about 7 GB, minutes); later calls install nothing.
END
}

python_for_venv() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "run_eval.sh: no Python 3.10 or newer was found; install one and run this again" >&2
  return 1
}

setup() {
  # The stamp is written last and names what was installed: an interrupted setup is taken up
  # again, and a changed pyproject.toml or a moved checkout installs anew.
  local stamp=.venv/installed wanted
  wanted="$(pwd) $(cksum < pyproject.toml)"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return; fi
  echo "Setting up .venv: torch, transformers and lmms-eval are about 7 GB and take minutes." >&2
  local python
  python="$(python_for_venv)"
  if ! "$python" -m venv .venv; then
    echo "run_eval.sh: $python has no venv module (on Debian: apt install python3-venv)" >&2
    return 1
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' >&2
  echo "$wanted" > "$stamp"
}

evaluate() {
  # lmms-eval exits 0 when a run has failed; its own word for it makes this exit 1.
  local log status=0
  log="$(mktemp)"
  trap 'rm -f "$log"' EXIT
  .venv/bin/python -m lmms_eval --include_path tasks "$@" | tee "$log" || status=$?
  if grep -q "Error during evaluation" "$log"; then status=1; fi
  return "$status"
}

case "${1:-}" in
  -h | --help | help)
    usage
    ;;
  "")
    setup
    HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 .venv/bin/sparsemm-eval demo
    ;;
  test)
    setup
    shift
    HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
    ;;
  --)
    setup
    shift
    evaluate "$@"
    ;;
  *)
    setup
    .venv/bin/sparsemm-eval "$@"
    ;;
esac
