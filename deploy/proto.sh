#!/usr/bin/env bash
# Makes all that is made of proto/, below a directory (default: this one): the Python stubs in generated/; the files of
# google/ that proto/ imports, so that it needs nothing else; the descriptor image and the reference for clients.
# The proto path is the Python package, so that imports need no rewriting; no Python is made of google/*, which
# googleapis-common-protos brings.
set -euo pipefail
cd "$(dirname "$0")/.."
root=${1:-.}
python=${PYTHON:-.venv/bin/python}
PATH="$(dirname "$python"):$PATH" # protoc looks its mypy plugins up there
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mapfile -t protos < <(find proto/retail -name '*.proto' | LC_ALL=C sort)
mkdir -p "$root"/{generated,proto,docs} build
for name in api/field_behavior rpc/error_details rpc/status type/date type/decimal; do
  mkdir -p "$root/proto/google/${name%/*}"
  cp "$site/google/$name.proto" "$root/proto/google/$name.proto"
done
out="$root/generated"
"$python" -m grpc_tools.protoc -Iproto \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" "${protos[@]}"
cp proto/service_config.json "$out/retail/"
find "$out/retail" -type d -exec touch {}/__init__.py \;
# error_details is what every error carries, though no message of ours names it.
"$python" -m grpc_tools.protoc -Iproto --descriptor_set_out=build/api.binpb --include_imports --include_source_info \
  "${protos[@]}" proto/google/rpc/error_details.proto
"$python" deploy/reference.py build/api.binpb "$root/proto/image.binpb" "$root/docs/reference.md"
