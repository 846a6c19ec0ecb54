#!/usr/bin/env bash
# What the tests use of the system: Chromium, for the report's page. Where it cannot be installed
# its tests are skipped, so this never fails.
set -uo pipefail

for name in chromium chromium-browser google-chrome; do
  if command -v "$name" > /dev/null; then exit 0; fi
done
if ! command -v apt-get > /dev/null; then
  echo "system_packages.sh: no apt-get here, so no Chromium is installed" >&2
elif [ "$(id -u)" != 0 ]; then
  echo "system_packages.sh: only root may install Chromium" >&2
elif ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -qq --no-install-recommends chromium; } > /dev/null 2>&1; then
  echo "system_packages.sh: apt-get could not install Chromium" >&2
fi
exit 0
