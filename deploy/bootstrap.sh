#!/bin/sh
# Brings to this machine what the project needs and the machine lacks.
#
#   deploy/bootstrap.sh             .venv, holding exactly what requirements-dev.txt locks
#   deploy/bootstrap.sh rabbitmq    a RabbitMQ server, through the machine's package manager
#   deploy/bootstrap.sh debian P... (as root) Debian packages, without starting what they bring
set -eu
root=$(cd "$(dirname "$0")/.." && pwd -P)
cd "$root"

fail() {
  printf '%s\n' "$@" >&2
  exit 1
}

# The lock file, the interpreter and the place (scripts in .venv/bin name it): what a finished .venv was made for.
venv_identity() {
  cat requirements-dev.txt
  .venv/bin/python -V 2>/dev/null
  pwd -P
  echo with generated.pth
}

venv_is_ready() {
  [ -x .venv/bin/python ] && [ "$(venv_identity | sha256sum)" = "$(cat .venv/installed 2>/dev/null)" ]
}

venv() {
  venv_is_ready && return
  (umask 077 && mkdir -p .local)
  exec 9>.local/bootstrap.lock
  flock 9 # a second make waits here, and then finds the work done
  venv_is_ready && return

  python=${BOOTSTRAP_PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "Python 3.11 or later is needed: install it, or name one with BOOTSTRAP_PYTHON=/path/to/python3."
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then # Debian keeps it in a package of its own
    debian python3-venv
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python cannot make virtual environments (no ensurepip)."
  fi

  echo "Installing the locked packages into .venv (about a minute, once) …"
  # From scratch: what an interrupted install has left cannot be told from what is complete.
  "$python" -m venv --clear .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
    --require-hashes -r requirements-dev.txt || fail "The packages could not be installed; run make again to retry."
  # The generated code is found without PYTHONPATH: `.venv/bin/python -m relay_svc status` works as it stands.
  echo "$root/generated" >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/generated.pth"
  venv_identity | sha256sum >.venv/installed
}

rabbitmq() {
  if command -v apt-get >/dev/null; then
    debian rabbitmq-server
  elif command -v brew >/dev/null; then
    brew install rabbitmq
  else
    fail "RabbitMQ is not installed, and there is neither apt-get nor brew here.
$choices"
  fi
}

choices="Or
  install rabbitmq-server in another way, or
  name a server of your own: AMQP_URL=amqp://user:password@host:5672/%2F make run, or
  run everything in containers with the compose file in deploy/."

debian() {
  command -v apt-get >/dev/null || fail "Please install $*, then run make again."
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || fail "Installing $* needs root. As root, run
  sh deploy/bootstrap.sh debian $*
and then make again. $([ "$1" = rabbitmq-server ] && echo "$choices")"
    sudo -n sh deploy/bootstrap.sh debian "$@"
    return
  fi
  export DEBIAN_FRONTEND=noninteractive
  log=$(mktemp)
  trap 'forbid_nothing; rm -f "$log"' EXIT
  trap 'exit 130' HUP INT TERM
  forbid_starting
  # An old package list may still do, so only the install decides.
  apt-get -q update >"$log" 2>&1 || true
  apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "$@" >>"$log" 2>&1 ||
    fail "$(tail -n 20 "$log")" "apt-get could not install $*."
  # Nor at the next boot: the private node is all we need.
  case " $* " in *" rabbitmq-server "*) update-rc.d rabbitmq-server disable >/dev/null 2>&1 || true ;; esac
}

# Packages of servers start them when installed, unless this policy file says no. One that is there is put aside.
policy=/usr/sbin/policy-rc.d
forbid_starting() {
  [ ! -e "$policy" ] || mv "$policy" "$policy.aside"
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
}
forbid_nothing() {
  rm -f "$policy"
  [ ! -e "$policy.aside" ] || mv "$policy.aside" "$policy"
}

case ${1:-venv} in
venv | rabbitmq) "${1:-venv}" ;;
debian) "$@" ;;
*) fail "usage: $0 [rabbitmq | debian PACKAGE...]" ;;
esac
