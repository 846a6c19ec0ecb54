#!/usr/bin/env bash
# Slurm for tests/sweep/test_slurm.py, which is skipped where this cannot be done.
set -euo pipefail
if command -v slurmctld > /dev/null && command -v munged > /dev/null; then exit; fi
if ! command -v apt-get > /dev/null || [ "$(id -u)" != 0 ]; then
  echo "tests/slurm/install.sh: no apt-get, or not root: the Slurm tests will be skipped" >&2
  exit
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update --quiet=2 &&
  apt-get install --quiet=2 --yes --no-install-recommends slurm-wlm munge > /dev/null; }; then
  echo "tests/slurm/install.sh: apt-get failed: the Slurm tests will be skipped" >&2
fi
