#!/bin/sh
# Brings to this checkout what the project needs and the machine lacks. It needs no root, and changes nothing outside.
#
#   deploy/bootstrap.sh                       .venv: exactly what requirements-dev.txt locks, and the project, editable
#   deploy/bootstrap.sh rabbitmq [DIRECTORY]  RabbitMQ and its Erlang, unpacked there; else in .local/rabbitmq-server
#   deploy/bootstrap.sh chromium              for tests of the pages: a Chromium without windows, in .local/chromium
#   deploy/bootstrap.sh package DIRECTORY P…  any packages of Debian, unpacked there
set -eu
root=$(cd "$(dirname "$0")/.." && pwd -P)
cd "$root"

fail() {
  printf '%s\n' "$@" >&2
  exit 1
}

# A second make waits here, and then finds the work done.
one_at_a_time() {
  (umask 077 && mkdir -p .local)
  exec 9>.local/bootstrap.lock
  flock 9
}

# The lock file, the interpreter and the place (scripts in .venv/bin name it): what a finished .venv was made for.
venv_identity() {
  cat requirements-dev.txt
  .venv/bin/python -V 2>/dev/null
  pwd -P
}

venv_is_ready() {
  [ -x .venv/bin/python ] && [ "$(venv_identity | sha256sum)" = "$(cat .venv/installed 2>/dev/null)" ]
}

# The commands in .venv/bin are made from pyproject.toml.
project_is_ready() {
  [ "$(sha256sum <pyproject.toml)" = "$(cat .venv/project 2>/dev/null)" ]
}

venv() {
  venv_is_ready && project_is_ready && return
  one_at_a_time
  venv_is_ready || packages
  project_is_ready || project
}

project() {
  # The lock file holds the build backend as well, so this fetches nothing.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
    --no-deps --no-index --no-build-isolation --editable . || fail "The project could not be installed into .venv."
  sha256sum <pyproject.toml >.venv/project
}

packages() {
  python=${BOOTSTRAP_PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "Python 3.11 or later is needed: install it, or name one with BOOTSTRAP_PYTHON=/path/to/python3."

  echo "Installing the locked packages into .venv (about a minute, once) …"
  # From scratch: what an interrupted install has left cannot be told from what is complete.
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv --clear .venv
  else # Debian has pip for new environments in a package of its own
    [ -d .local/pip ] || { unpack .local/pip python3-pip-whl && finish .local/pip; } ||
      fail "$python has no ensurepip, and Debian's pip could not be fetched instead." "$(tail -n 20 "$new/log")"
    pip=$(echo .local/pip/usr/share/python-wheels/pip-*.whl)
    "$python" -m venv --clear --without-pip .venv
    .venv/bin/python "$pip/pip" install --quiet --no-index "$pip"
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
    --require-hashes -r requirements-dev.txt || fail "The packages could not be installed; run make again to retry."
  venv_identity | sha256sum >.venv/installed
}

choices="Or
  install rabbitmq-server in another way, or
  name a server of your own: AMQP_URL=amqp://user:password@host:5672/%2F make run, or
  run everything in containers with the compose file in deploy/."

rabbitmq() {
  directory=${1:-.local/rabbitmq-server}
  one_at_a_time
  if [ -d "$directory" ]; then
    return
  elif command -v apt-get >/dev/null && command -v dpkg >/dev/null; then # Debian; Ubuntu is untried
    unpack "$directory" rabbitmq-server ||
      fail "RabbitMQ's packages could not be fetched; run make again to retry." "$choices" "$(tail -n 20 "$new/log")"
    for_any_place "$directory.new/root/usr/lib"
    finish "$directory"
  elif command -v brew >/dev/null; then # untried
    brew install rabbitmq
  else
    fail "RabbitMQ is not installed, and there is neither apt-get nor brew here." "$choices"
  fi
}

chromium() {
  command -v apt-get >/dev/null || fail "Chromium comes from Debian's packages, and there is no apt-get here." \
    "Install chromium in another way: what is found as chromium, chromium-headless-shell or google-chrome is used."
  package .local/chromium chromium-headless-shell fonts-inter
}

package() {
  one_at_a_time
  [ -d "$1" ] || { unpack "$@" && finish "$1"; } || fail "$* could not be fetched." "$(tail -n 20 "$new/log")"
}

# unpack DIRECTORY PACKAGE…: into DIRECTORY.new/root, with all that it needs and the machine lacks. If it fails,
# DIRECTORY.new/log says why. `finish` moves it to its place. What was fetched before an interruption is not fetched again.
unpack() {
  new=$(mkdir -p "$1.new" && cd "$1.new" && pwd -P)
  shift
  rm -rf "$new/root"
  mkdir -p "$new/root" "$new/lists/partial" "$new/archives/partial"
  # An Erlang of the machine's own is left out of account: it may be another one tomorrow.
  awk 'BEGIN { RS = ""; ORS = "\n\n" } !/^Package: (erlang|rabbitmq)/' /var/lib/dpkg/status >"$new/status"
  # What the machine's apt does after an update concerns its own folders.
  cat >"$new/apt.conf" <<'END'
Debug::NoLocking "true";
APT::Sandbox::User "root"; // another user could not write here
APT::Install-Recommends "false";
Acquire::Languages "none";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
END
  # Lists that could not be brought up to date may still do: only the download decides.
  own_apt update >"$new/log" 2>&1 || true
  own_apt autoclean >>"$new/log" 2>&1 || true # versions of before an interruption
  own_apt --download-only install "$@" >>"$new/log" 2>&1 || return 1
  for package in "$new"/archives/*.deb; do
    dpkg -x "$package" "$new/root" || return 1
  done
}

own_apt() {
  apt-get -q -y -c "$new/apt.conf" -o Dir::State="$new" -o Dir::State::lists=lists/ -o Dir::State::status="$new/status" \
    -o Dir::Cache="$new" -o Dir::Cache::archives=archives/ "$@"
}

finish() {
  mv "$1.new/root" "$1"
  rm -rf "$1.new"
}

for_any_place() {
  # RabbitMQ's own script falls over a space in its path.
  sed -i -e 's#^\. \(${RABBITMQ_SCRIPTS_DIR}.*\)#. "\1"#' -e 's# $SCRIPT_PATH# "$SCRIPT_PATH"#' \
    "$1"/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-env
  # Erlang's knows the place that its package is made for, and no other.
  cat >"$1/erlang/bin/erl" <<'END'
#!/bin/sh
ROOTDIR=$(dirname "$(dirname "$(readlink -f "$0")")")
BINDIR=$(echo "$ROOTDIR"/erts-*/bin)
EMU=beam
PROGNAME=erl
export ROOTDIR BINDIR EMU PROGNAME
for libraries in "$ROOTDIR"/../*-linux-gnu*; do # what came with it, as the machine lacked it
  [ ! -d "$libraries" ] || export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
done
exec "$BINDIR/erlexec" "$@"
END
  ln -sf ../../bin/erl "$1"/erlang/erts-*/bin/erl # with this one, a node starts others
}

case ${1:-venv} in
venv) venv ;;
rabbitmq) rabbitmq "${2:-}" ;;
chromium) chromium ;;
package) shift && package "$@" ;;
*) fail "usage: $0 [rabbitmq [DIRECTORY] | chromium | package DIRECTORY PACKAGE…]" ;;
esac
