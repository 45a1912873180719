"""`python -m deploy.local COMMAND`: what `make run`, `start`, `stop`, `status`, `demo`, `watch` and `test` do."""

import argparse
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from urllib.parse import urlsplit

from deploy.local import grafana, terminal
from deploy.local.grafana import Grafana
from deploy.local.launch import how_it_ended
from deploy.local.machine import Process, StackError
from deploy.local.prometheus import Prometheus
from deploy.local.services import PAGES, TLS_SETTING
from deploy.local.stack import Stack

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = grafana.FILES / "dashboards" / "retail-backbone.json"
WATCH_S = 0.5
PATIENCE_S = 20.0  # for the demo or the tests to wind up after Ctrl-C
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NEXT = (
    ("retail-analytics report", "the owner's page, in a terminal"),
    ("retail-analytics audit", "are the numbers right, and complete?"),
    ("retail-relay status", "what is on its way, and why"),
)
# Where the tests find PostgreSQL, RabbitMQ, and that one's directory.
TEST_SERVERS = ("TEST_POSTGRES_URL", "TEST_AMQP_URL", "TEST_BROKER_DIRECTORY")
INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


class Interrupted(BaseException):
    """Somebody wants us to end; like KeyboardInterrupt, nothing that `except Exception` should catch."""


def main() -> int:
    commands: dict[str, Callable[[Stack, list[str]], int]] = {
        "run": run,
        "start": start,
        "stop": stop,
        "status": status,
        "demo": demo,
        "watch": watch,
        "test": test,
    }
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    parser.add_argument("command", choices=commands)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for the demo or for pytest")
    chosen = parser.parse_args()
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        if sys.platform != "linux":
            raise StackError("the local stack needs Linux; elsewhere use the compose file in deploy/")
        # Tests have the servers of a chain with one cell, whatever else runs.
        stack = Stack(ROOT, number_of_cells=1 if commands[chosen.command] is test else None)
        return commands[chosen.command](stack, chosen.arguments)
    except StackError as error:
        terminal.fail(str(error))
        return 1
    except Interrupted:
        return INTERRUPTED


def _interrupt(number: int, _: FrameType | None) -> None:
    """The first signal ends what we do; none after it may end the cleaning up, which is bounded anyway."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(number)


def run(stack: Stack, _: Sequence[str]) -> int:
    with stack.used(temporary=False) as started:
        terminal.say("" if started else "Everything is running already; this command watches it now.\n")
        show_endpoints(stack)
        terminal.say("\nCtrl-C stops it all.")
        try:
            return until_nothing_runs(stack)
        except Interrupted:
            terminal.say("")
            with stack.changing():
                stack.stop()
            return 0


def start(stack: Stack, _: Sequence[str]) -> int:
    with stack.used(temporary=False) as started:
        terminal.say("" if started else "Everything is running already.\n")
        show_endpoints(stack)
    terminal.say("\n`make stop` stops it, `make status` shows it.")
    return 0


def stop(stack: Stack, _: Sequence[str]) -> int:
    with stack.changing():
        stack.stop()
    terminal.done("nothing of this checkout is running")
    return 0


def status(stack: Stack, _: Sequence[str]) -> int:
    processes = stack.processes().items()
    terminal.table([(name, f"pid {it.pid}" if it else "-", _log(stack, name)) for name, it in processes])
    return 0


def demo(stack: Stack, arguments: Sequence[str]) -> int:
    with stack.used(temporary=True):
        journals = ["--journals", str(stack.launcher.data / "tills")]  # a given one comes later, and counts
        return _in_foreground(["-m", "pos", "demo", *journals, *arguments], stack.client_environ())


def watch(stack: Stack, _: Sequence[str]) -> int:
    """Prometheus beside the stack, and Grafana where it is installed, until Ctrl-C; they keep what they have seen."""
    prometheus = Prometheus(stack.home / "prometheus", log=stack.log_of("prometheus"))
    installed = grafana.home()
    dashboard = installed and Grafana(installed, stack.home / "grafana", stack.log_of("grafana"))
    with stack.used(temporary=True):
        endpoints, jobs = stack.endpoints(), dict[str, list[str]]()
        for program in stack.programs:  # those of all cells are one job, as the alarms want it
            jobs.setdefault(program.kind, []).append(urlsplit(endpoints[program.name][1]).netloc)
        watching = prometheus.start({job: ",".join(pages) for job, pages in jobs.items()})
        try:
            terminal.say(f"\nAlarms: http://{prometheus.address}/alerts")
            if dashboard:
                dashboard.start(prometheus.address)
                terminal.say(f"Dashboard: {dashboard.url}")
            else:
                terminal.say(f"Grafana is not installed; its dashboard: {os.path.relpath(DASHBOARD)}")
            terminal.say("Ctrl-C stops it.")
            while watching.alive:
                time.sleep(WATCH_S)
        except Interrupted:
            return 0
        finally:
            if dashboard:
                dashboard.stop()
            prometheus.stop()
    terminal.fail(f"Prometheus {how_it_ended(watching)} (log: {_log(stack, 'prometheus')})")
    return 1


def test(stack: Stack, arguments: Sequence[str]) -> int:
    if all(os.environ.get(name) for name in TEST_SERVERS):
        return _in_foreground(["-m", "pytest", *arguments], stack.client_environ())
    with stack.used(temporary=True, servers_only=True):
        environ = _test_environ(stack)
        return _in_foreground(["-m", "pytest", *arguments], environ) if arguments else _all_tests(stack, environ)


def _test_environ(stack: Stack) -> dict[str, str]:
    directory = str(stack.rabbitmq.directory)
    servers = zip(TEST_SERVERS, (stack.postgres.url(), stack.rabbitmq.url, directory), strict=True)
    return {**stack.client_environ(), **dict(servers)}


def _all_tests(stack: Stack, environ: Mapping[str, str]) -> int:
    """Two run beside each other, as most of what tests do is to wait: from either end, file by file, until they meet.
    Each has servers and ports of its own, so that neither meets what the other does to them.
    """
    beside = stack.home / "second"
    beside.mkdir(exist_ok=True)
    second, log = Stack(beside, number_of_cells=1), stack.log_of("tests-from-the-end")
    with (
        second.used(temporary=True, servers_only=True),
        TemporaryDirectory() as taken,
        log.open("w") as output,
    ):
        both = {"TEST_FILES_TAKEN": taken}
        child = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
            env={**_test_environ(second), **both, "TEST_ORDER": "from the end", "TEST_PORTS": "odd"},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = _in_foreground(["-m", "pytest"], {**environ, **both})
            terminal.say(f"\nThose from the end (log: {_log(stack, log.stem)}):\n")
            code = max(code, abs(child.wait()))
            terminal.say(log.read_text())
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
                if not _ended(child):
                    child.kill()
    return code


def _in_foreground(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run Python on our terminal; its exit code. When we are interrupted, it is too, and gets time to wind up."""
    child = subprocess.Popen([sys.executable, *arguments], env=environ, cwd=ROOT)
    try:
        code = child.wait()
    except Interrupted as interrupted:
        if interrupted.args[0] != signal.SIGINT:  # a Ctrl-C in the terminal reaches the child by itself
            child.send_signal(signal.SIGINT)
        for number in (signal.SIGINT, signal.SIGKILL):
            if _ended(child):
                break
            child.send_signal(number)
        raise
    return code if code >= 0 else 128 - code


def _ended(child: "subprocess.Popen[bytes]") -> bool:
    try:
        child.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def until_nothing_runs(stack: Stack) -> int:
    """Say what ends and what comes back, until nothing is left; 1 if anything has failed."""
    everything = stack.processes()
    alive = {name: process for name, process in everything.items() if process}
    code = 0
    while alive:
        time.sleep(WATCH_S)
        for name, process in list(alive.items()):
            if not process.alive:
                del alive[name]
                code |= _report_end(stack, name, process)
        if len(alive) < len(everything):  # only then is it worth searching all processes of the machine
            for name, found in stack.processes().items():
                if found and name not in alive:
                    alive[name] = found
                    terminal.done(f"{name} runs again, as pid {found.pid}")
    terminal.say("Nothing is left running.")
    return code


def _report_end(stack: Stack, name: str, process: Process) -> int:
    failed = process.exit_code() not in (0, None)
    tell = terminal.fail if failed else terminal.say
    tell(f"{name} {how_it_ended(process)} (log: {_log(stack, name)}); `make start` starts it again")
    return int(failed)


def show_endpoints(stack: Stack) -> None:
    endpoints = stack.endpoints()
    terminal.say(f"For people: http://{endpoints[PAGES.name][0]}/\n")
    rows = [(name, address, metrics, _log(stack, name)) for name, (address, metrics) in endpoints.items()]
    terminal.table([("", "address", "metrics", "log"), *rows])
    if file := stack.launcher.cells_file:
        terminal.say(f"\nWhich branch is in which cell: {os.path.relpath(file)}")
    certificates = stack.launcher.certificates if stack.settings.get(TLS_SETTING) == "1" else None
    terminal.say(_example_calls(endpoints["purchases"][0], endpoints["analytics"][0], certificates))
    terminal.say("\nAnd then:\n")
    terminal.table([(f"  .venv/bin/{command}", what) for command, what in NEXT])


def _log(stack: Stack, name: str) -> str:
    return str(stack.log_of(name).relative_to(stack.root))


def _example_calls(purchases: str, analytics: str, certificates: Path | None) -> str:
    now = datetime.now(UTC)
    sale = (
        f'{{"idempotency_key": "{uuid.uuid4()}", "purchase": {{"receipt_id": "{now:%H%M%S}", "branch_id": 1, '
        f'"cashier_id": 17, "pos_id": "POS-3", "purchase_time": "{now:%Y-%m-%dT%H:%M:%SZ}", '
        '"items": [{"product_id": 1001, "quantity": 1, "unit_price": {"value": "8.90"}}]}}'
    )
    summary = f"{analytics}/retail.analytics.v1.AnalyticsService/GetSalesSummary"
    grpcurl, buf, scheme = "-plaintext", "--http2-prior-knowledge", "http"
    if certificates:
        whose = [certificates / name for name in ("ca", "branch-1-till-POS-3", "operator-kim")]
        ca, till, operator = (os.path.relpath(name) for name in whose)
        grpcurl = f"-cacert {ca}.pem -cert {till}.pem -key {till}-key.pem -protoset proto/image.binpb"
        buf, scheme = f"--cacert {ca}.pem --cert {operator}.pem --key {operator}-key.pem", "https"
    return f"""
Record a sale, then ask for the sum:

  grpcurl {grpcurl} -d '{sale}' {purchases} retail.purchases.v1.PurchasesService/CreatePurchase

  .venv/bin/buf curl --protocol grpc {buf} -d '{{}}' {scheme}://{summary}"""


if __name__ == "__main__":
    sys.exit(main())
