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
PYTHONPATH=.:generated lint-imports --no-cache

step 'generated code is what proto/ generates'
rm -rf build/fresh
deploy/proto.sh build/fresh # also leaves the descriptor set build/api.binpb
diff -r -x __pycache__ generated build/fresh

step 'buf: style of the contracts, and no breaking change since the last release'
buf lint build/api.binpb --config '{"version":"v2","lint":{"use":["STANDARD","COMMENTS"],"ignore":["google"]}}'
if release=$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null); then
  rm -rf build/release && mkdir -p build/release
  git archive "$release" proto | tar -x -C build/release
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mapfile -t protos < <(find build/release/proto -name '*.proto')
  "$python" -m grpc_tools.protoc -Ibuild/release/proto -I"$site" \
    --descriptor_set_out=build/release.binpb --include_imports "${protos[@]}"
  buf breaking build/api.binpb --against build/release.binpb \
    --config '{"version":"v2","breaking":{"use":["FILE"],"ignore":["google"]}}'
else
  echo 'no release is tagged yet: nothing to break'
fi

step 'hadolint: the container file'
hadolint deploy/Dockerfile

step 'the locked packages are those that pyproject.toml asks for'
"$python" deploy/check_lock.py
