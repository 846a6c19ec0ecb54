#!/usr/bin/env bash
# The front door. `./run_eval.sh` runs the demo, `./run_eval.sh test` the tests; see usage.
set -euo pipefail
root="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
venv="$root/.venv"
lock="$root/requirements.lock"
cpu_index=https://download.pytorch.org/whl/cpu

usage() {
  cat <<'END'
./run_eval.sh                  the demo on the embedded models, offline; tables and a page in results/demo_run/
./run_eval.sh test [ARGS]      the tests; ARGS go to pytest
./run_eval.sh -- ARGS          python -m lmms_eval ARGS, with our models and tasks known to it
./run_eval.sh COMMAND [ARGS]   any other command of sparsemm-eval (demo, chase, …); --help lists them
./run_eval.sh setup [--cpu [INDEX] | --gpu]
                               install only, or again; --cpu: the smaller build of torch, from INDEX
The first call makes .venv and installs what requirements.lock names into it: 7.2 GB and 5 to 15
minutes, with the CPU build of torch about 2.5 GB. Later calls install nothing. What breaks off is
taken up by the next call.
END
}

say() { echo "run_eval.sh: $*" >&2; }

# Of a Python: whether the lock was made for it and for this machine.
is_locked() {
  case "$(uname -sm)" in "Linux x86_64" | "Linux aarch64") ;; *) return 1 ;; esac
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2> /dev/null
}

python_for_venv() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    if is_locked "$candidate"; then echo "$candidate" && return; fi
  done
  for candidate in python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
      echo "$candidate" && return
    fi
  done
  say "no Python 3.10 or newer was found; install one and run this again"
  return 1
}

# Runs pip, its words in a log; a line now and then says that it lives.
install() {
  local log="$venv/install.log" seconds=0 fetched
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" \
    > "$log" 2>&1 &
  local pip=$!
  trap 'kill "$pip" 2> /dev/null; exit 130' INT TERM
  while kill -0 "$pip" 2> /dev/null; do
    sleep 1
    seconds=$((seconds + 1))
    if ((seconds % 20 == 0)); then
      fetched="$(grep -c '^Collecting ' "$log" || true)"
      if grep -q '^Installing collected packages' "$log"; then
        echo "  $seconds s: unpacking, $(du -sh "$venv" 2> /dev/null | cut -f1) so far" >&2
      else
        echo "  $seconds s: $fetched packages fetched" >&2
      fi
    fi
  done
  trap - INT TERM
  if ! wait "$pip"; then
    say "installing failed; the end of $log:"
    sed '/^WARNING/d' "$log" | tail -n 5 >&2
    say "run this again to go on; what is there already is kept"
    return 1
  fi
}

# The CPU build of torch is not on PyPI: it comes from its own index, in the version of the lock,
# and the lock's other packages without those that serve a GPU.
install_cpu() {
  local pinned
  pinned="$(grep -Eo '^(torch|torchvision)==[^ ]+' "$lock")"
  # shellcheck disable=SC2086
  install --no-deps --index-url "$1" $pinned
  awk '/^[a-z]/ { gpu = /^(torch|torchvision|triton|nvidia-|cuda-)/ } !gpu' "$lock" \
    > "$venv/cpu.lock"
  install --no-deps --require-hashes -r "$venv/cpu.lock"
}

# What a killed pip left half unpacked: its packages have no INSTALLER yet, and are made again.
remove_halves() {
  local folder
  for folder in "$venv"/lib/python*/site-packages/*.dist-info; do
    if [ -d "$folder" ] && [ ! -f "$folder/INSTALLER" ]; then rm -r "$folder"; fi
  done
  rm -rf "$venv"/lib/python*/site-packages/~*
}

setup() {
  # The stamp is written last and names what was installed: an interrupted setup is taken up
  # again, and a changed lock or pyproject.toml, or a moved checkout, installs anew. Which build of
  # torch was asked for last, and from where, outlives an installation that broke off.
  local stamp="$venv/installed" choice="$venv/build" force="" build index before wanted python
  build=gpu index="$cpu_index"
  if [ -f "$choice" ]; then read -r build index < "$choice"; fi
  before="$build"
  if [ "${1:-}" = again ]; then
    force=yes
    shift
    case "${1:-}" in
      "") ;;
      --gpu) build=gpu ;;
      --cpu) build=cpu index="${2:-$cpu_index}" ;;
      *) say "setup knows --cpu [INDEX] and --gpu, not $1" && return 1 ;;
    esac
  fi
  wanted="$root $(cat "$root/pyproject.toml" "$lock" | cksum)
$build"
  if [ -z "$force" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return; fi
  if [ -d "$venv" ] && [ "$build" != "$before" ]; then
    say "making .venv anew: pip takes one build of torch for the other"
    rm -rf "$venv"
  fi
  python="$(python_for_venv)"
  if [ -x "$venv/bin/python" ]; then python="$venv/bin/python"; fi
  rm -f "$stamp"
  remove_halves
  if ! [ -x "$venv/bin/pip" ] && ! "$python" -m venv "$venv"; then
    say "$python has no venv module (on Debian: apt install python3-venv)"
    return 1
  fi
  echo "$build $index" > "$choice"
  if [ "$build" = cpu ]; then
    say "installing into .venv with the CPU build of torch: about 2.5 GB, 3 to 10 minutes"
  else
    say "installing into .venv: 7.2 GB, most of it torch with CUDA, 5 to 15 minutes"
    if ! [ -e /proc/driver/nvidia ] && ! command -v nvidia-smi > /dev/null; then
      say "no NVIDIA GPU is seen here; './run_eval.sh setup --cpu' takes a build that is 5 GB smaller"
    fi
  fi
  if ! is_locked "$venv/bin/python"; then
    say "the lock is for Python 3.10 to 3.14 on Linux, this is $("$venv/bin/python" -V) on" \
      "$(uname -sm): installing the newest packages that fit, which nobody has tested together"
    install --editable "$root[dev]"
  else
    if [ "$build" = cpu ]; then
      install_cpu "$index"
    else
      install --no-deps --require-hashes -r "$lock"
    fi
    install --no-deps --no-build-isolation --editable "$root"
  fi
  echo "$wanted" > "$stamp"
  say "installed"
}

# Whether one of the arguments of pytest is a file, a folder or a test in one.
names_a_path() {
  local before="" word
  for word in "$@"; do
    case "$before" in
      -[kmnporWc] | --ignore | --deselect | --basetemp | --rootdir) ;; # the word is this option's
      *) if [ -e "${word%%::*}" ]; then return 0; fi ;;
    esac
    before="$word"
  done
  return 1
}

eval_command="$venv/bin/sparsemm-eval"
case "${1:-}" in
  -h | --help | help)
    usage
    ;;
  "")
    setup
    HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 "$eval_command" demo
    ;;
  setup)
    shift
    setup again "$@"
    ;;
  test)
    setup
    shift
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
    "$eval_command" doctor --libraries
    # From the caller's folder, so that paths among ARGS are the caller's; all tests if it is none.
    if ! names_a_path "$@"; then set -- "$@" "$root/tests"; fi
    "$venv/bin/python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" \
      -n 2 --dist loadfile --no-loadscope-reorder "$@"
    ;;
  --)
    setup
    shift
    "$eval_command" eval "$@"
    ;;
  *)
    setup
    "$eval_command" "$@"
    ;;
esac
