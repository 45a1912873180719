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

step 'deploy/grafana is what deploy/dashboard.py makes'
"$python" -m deploy.dashboard build/fresh/retail-backbone.json
diff deploy/grafana/dashboards/retail-backbone.json build/fresh/retail-backbone.json

# Compared with the contract that was accepted last; `make contract` accepts what proto/ says now. With the contract of the
# release before, a test compares it.
step 'buf: style of the contracts, and no breaking change since they were accepted'
buf lint proto
buf breaking proto --against proto/accepted.binpb

step 'hadolint: the container file'
hadolint deploy/Dockerfile

step 'the locked packages are those that pyproject.toml asks for'
"$python" deploy/check_lock.py
