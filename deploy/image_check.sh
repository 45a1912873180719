#!/usr/bin/env bash
# Builds the container image without Docker or a registry of images, and tries its commands. For root, on Debian:
# buildah builds, in a chroot; the base image is made by debootstrap. What it keeps is in .local/image.
#
#   OPTIONAL=1   where buildah or debootstrap is missing, say so and succeed; otherwise that is a failure
set -euo pipefail
cd "$(dirname "$0")/.."
home=$PWD/.local/image
release=bookworm

for tool in buildah debootstrap; do
  command -v "$tool" >/dev/null && continue
  echo "The image is not checked: $tool is missing (on Debian: apt-get install --no-install-recommends $tool)."
  [ "${OPTIONAL:-}" = 1 ] && exit 0
  exit 1
done
[ "$(id -u)" = 0 ] || { echo "The image is not checked: debootstrap needs root."; [ "${OPTIONAL:-}" = 1 ] && exit 0; exit 1; }

(umask 077 && mkdir -p .local)
mkdir -p "$home"
images() { buildah --root "$home/storage" --runroot "$home/run" --storage-driver vfs "$@"; }
step() { printf '\033[1m%s\033[0m\n' "$1"; }

if ! images inspect --type image retail-base >/dev/null 2>&1; then
  step "a base image: Debian $release with Python"
  root=$(mktemp -d "$home/root.XXXX")
  trap 'rm -rf "$root"' EXIT
  mirror=$(apt-get indextargets --format '$(REPO_URI)' | head -n 1)
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv "$release" "$root" "$mirror" >"$home/debootstrap.log" 2>&1 ||
    { tail -n 20 "$home/debootstrap.log"; exit 1; }
  base=$(images from scratch)
  images add --quiet "$base" "$root" / >/dev/null
  images commit --quiet --rm "$base" retail-base >/dev/null
  rm -rf "$root"
fi

step 'deploy/Dockerfile'
# pip is configured as on this machine.
shared=()
for path in /etc/pip.conf /etc/ssl/certs; do [ ! -e "$path" ] || shared+=(--volume "$path:$path:ro"); done
images bud --quiet --isolation chroot --build-arg BASE=localhost/retail-base "${shared[@]}" \
  -f deploy/Dockerfile -t retail-backbone . >"$home/build.log" 2>&1 || { tail -n 30 "$home/build.log"; exit 1; }

step 'its commands, as the user they run as'
container=$(images from retail-backbone)
trap 'images rm "$container" >/dev/null' EXIT
inside() { images run --isolation chroot "$container" -- "$@"; }
[ "$(inside id -u)" = 10001 ]
for command in retail-purchases retail-relay retail-analytics retail-pos; do
  inside "$command" --version
  inside "$command" settings >/dev/null
done
inside python healthcheck.py 127.0.0.1:1 && exit 1 # nobody serves there
inside sh -c 'timeout 5 python certificates.py --keep-apart /certificates; test -s /certificates/analytics/own.pem'
inside retail-relay serve && exit 1 # it says which settings are missing
[ "$(images inspect --type image --format '{{.OCIv1.Config.Cmd}}' retail-backbone)" = '[retail-purchases serve]' ]
echo 'The image is well.'
