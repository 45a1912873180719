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
  --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
  -f deploy/Dockerfile -t retail-backbone . >"$home/build.log" 2>&1 || { tail -n 30 "$home/build.log"; exit 1; }

step 'its commands, as the user they run as'
container=$(images from retail-backbone)
trap 'images rm "$container" >/dev/null' EXIT
inside() { images run --isolation chroot "$container" -- "$@"; }
[ "$(inside id -u)" = 10001 ]
for command in retail-purchases retail-relay retail-analytics retail-pages retail-pos; do
  inside "$command" --version
  inside "$command" settings >/dev/null
done
inside python healthcheck.py 127.0.0.1:1 && exit 1 # nobody serves there
inside sh -c 'timeout 5 python certificates.py --keep-apart /certificates; test -s /certificates/analytics/own.pem'
inside retail-relay serve && exit 1 # it says which settings are missing
[ "$(images inspect --type image --format '{{.OCIv1.Config.Cmd}}' retail-backbone)" = '[retail-purchases serve]' ]

step 'its labels, what is in it, and its size'
labels=$(images inspect --type image --format '{{.OCIv1.Config.Labels}}' retail-backbone)
for label in title description version revision; do
  [[ $labels == *"org.opencontainers.image.$label:"* ]] || { echo "no label for its $label: $labels"; exit 1; }
done
mounted=$(images mount "$container")
python3 - "$mounted/app/sbom.cdx.json" requirements-otlp.txt <<'END'
import json, re, sys
parts = {part["name"].lower().replace("_", "-") for part in json.load(open(sys.argv[1]))["components"]}
locked = {name.lower() for name in re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==", open(sys.argv[2]).read(), re.MULTILINE)}
sys.exit(f"not in the list of its parts: {sorted(locked - parts)}" if locked - parts else 0)
END
cp "$mounted/app/sbom.cdx.json" "$home/sbom.cdx.json"
for left_out in pip setuptools wheel hatchling cyclonedx tests; do
  [ -z "$(find "$mounted"/app/venv/lib/python3*/site-packages -maxdepth 1 -iname "$left_out" -o -maxdepth 1 -iname "$left_out-*")" ] ||
    { echo "$left_out should not be in it"; exit 1; }
done
printf '%s: %s, of which /app %s\n' retail-backbone "$(du -sh "$mounted" | cut -f1)" "$(du -sh "$mounted/app" | cut -f1)"

step 'a process of it, as uid 10001 on a read-only root'
port=${IMAGE_CHECK_PORT:-29543}
unshare --mount --fork bash -eu -s "$mounted" "$port" <<'END'
root=$1 port=$2
mount --bind "$root" "$root"
mount -t tmpfs -o size=16m tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
mount -o remount,bind,ro "$root"
cat >"$root/tmp/run" <<'RUN'
cd /app
id -u
if touch /app/x 2>/dev/null; then echo "it can write to its root"; exit 1; fi
retail-analytics serve >/tmp/log 2>&1 &
process=$!
for _ in $(seq 120); do
  python healthcheck.py --alive "127.0.0.1:$1" && break
  kill -0 $process || { cat /tmp/log; exit 1; }
  sleep 0.5
done
python healthcheck.py --alive "127.0.0.1:$1" || { cat /tmp/log; exit 1; }
if python healthcheck.py "127.0.0.1:$1"; then echo "it cannot be SERVING: it has no database"; exit 1; fi
kill -TERM $process
wait $process
echo "alive, not SERVING without a database, and ended by SIGTERM with exit code $?"
RUN
chroot --userspec=10001:10001 --groups= "$root" env -i PATH=/app/venv/bin:/usr/bin:/bin \
  ANALYTICS_DATABASE_URL=postgresql://nobody@127.0.0.1:1/none ANALYTICS_LISTEN=127.0.0.1:"$port" \
  ANALYTICS_METRICS_LISTEN=127.0.0.1:0 sh -e /tmp/run "$port"
END
echo 'The image is well.'
