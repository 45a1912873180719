#!/usr/bin/env bash
# Everything that must stay true and that a command can check. Prints what it checks; ends at the first failure.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
PATH="$(cd "$(dirname "$python")" && pwd):$PATH"

step() { printf '\033[1m%s\033[0m\n' "$1"; }

step 'ruff: style and likely mistakes'
ruff check --quiet --no-cache .
ruff format --quiet --check --no-cache .

step 'mypy --strict: types'
mypy .

step 'import-linter: the direction of dependencies'
lint-imports --no-cache

step 'what is made of proto/ is what proto/ makes'
rm -rf build/fresh
deploy/proto.sh build/fresh
for made in generated proto/google proto/image.binpb docs/reference.md; do
  diff -r -x __pycache__ "$made" "build/fresh/$made"
done

step 'docs/settings.md is what the processes declare'
"$python" -m deploy.settings_page build/fresh/docs/settings.md
diff docs/settings.md build/fresh/docs/settings.md

# Compared with the contract that was accepted last. Nothing is released yet, so that a breaking change may be meant:
# `make contract` accepts what proto/ says now. From the first release on it is for a new major version only.
step 'buf: style of the contracts, and no breaking change since they were accepted'
buf lint proto
buf breaking proto --against proto/accepted.binpb

step 'hadolint: the container file'
hadolint deploy/Dockerfile

step 'the locked packages are those that pyproject.toml asks for'
"$python" deploy/check_lock.py
