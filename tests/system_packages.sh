#!/usr/bin/env bash
# What the tests use of the system: Chromium, for the report's page, and LaTeX, for its tables. Where
# one cannot be installed its tests are skipped, so this never fails.
set -uo pipefail

missing=()
found=""
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" > /dev/null; then found=$name; fi
done
if [ -z "$found" ]; then missing+=(chromium); fi
if ! command -v pdflatex > /dev/null || ! kpsewhich booktabs.sty > /dev/null; then
  missing+=(texlive-latex-base texlive-latex-recommended)
fi
if [ "${#missing[@]}" = 0 ]; then exit 0; fi
if ! command -v apt-get > /dev/null; then
  echo "system_packages.sh: no apt-get here, so ${missing[*]} are not installed" >&2
elif [ "$(id -u)" != 0 ]; then
  echo "system_packages.sh: only root may install ${missing[*]}" >&2
else
  apt-get update -qq > /dev/null 2>&1
  for name in "${missing[@]}"; do
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$name" \
      > /dev/null 2>&1 || echo "system_packages.sh: apt-get could not install $name" >&2
  done
fi
exit 0
