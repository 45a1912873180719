#!/usr/bin/env bash
# Generates the Python stubs from proto/ into a directory (default: generated/).
# The proto path is the Python package, so that imports need no rewriting; google/* is never generated,
# googleapis-common-protos brings it.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-generated}
python=${PYTHON:-.venv/bin/python}
PATH="$(dirname "$python"):$PATH" # protoc looks its mypy plugins up there
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mapfile -t protos < <(find proto -name '*.proto' | LC_ALL=C sort)
mkdir -p "$out" build
"$python" -m grpc_tools.protoc -Iproto -I"$site" \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
  --descriptor_set_out=build/api.binpb --include_imports --include_source_info "${protos[@]}"
find "$out/retail" -type d -exec touch {}/__init__.py \;
