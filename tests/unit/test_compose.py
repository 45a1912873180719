"""The compose file holds its own rules: what each container may do, which passwords it knows, and whom it reaches."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from chassis import cells
from chassis.settings import settings_of
from chassis.tls import Credentials
from deploy import broker, certificates, passwords
from deploy.local.grafana import Grafana
from deploy.local.services import PAGES
from pages_svc.settings import ServeSettings
from tests.conftest import ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
CONTAINERS: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVICES = ("purchases", "relay", "consumer", "analytics")
PROCESSES = (*SERVICES, "pages")
OPTIONAL = {"prometheus": ["watch"], "grafana": ["watch"], "pages": ["pages"]}  # started with `--profile …` only

TWO_CELLS: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.two-cells.yaml").read_text())
SECOND = {name: it for name, it in TWO_CELLS["services"].items() if name.endswith("-2")}  # what it adds

REQUIRED = re.compile(r"\$\{(\w+):\?[^}]+\}")  # compose refuses to start without it

# PostgreSQL's versions have two numbers, the others' three.
EXACT = re.compile(r"postgres:\d+\.\d+(-\w+)?|[\w/]+:v?\d+\.\d+\.\d+(-[\w-]+)?|[\w.:-]+@sha256:[0-9a-f]{64}")

every_container = pytest.mark.parametrize("container", (CONTAINERS | SECOND).values(), ids=CONTAINERS | SECOND)


def reached_from(name: str) -> set[str]:
    networks = set(CONTAINERS[name]["networks"])
    return {other for other, container in CONTAINERS.items() if networks & set(container["networks"])} - {name}


@every_container
def test_no_container_may_do_more_than_it_has_to(container: dict[str, Any]) -> None:
    assert container["read_only"] is True
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert container["user"] not in ("", "root", "0")
    assert container["pids_limit"] <= 512
    assert re.fullmatch(r"\d+[mg]", container["mem_limit"])
    assert not container.keys() & {"cap_add", "privileged", "network_mode", "pid", "ipc", "devices"}
    assert all(port.startswith("127.0.0.1:") for port in container.get("ports", ()))


@every_container
def test_images_are_exact(container: dict[str, Any]) -> None:
    """Others' have a digest, or a tag down to the last number. So has the one that ours is built on."""
    image = container["image"]
    if "build" in container:
        (image,) = re.findall(r"^ARG BASE=(.+)$", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    assert EXACT.fullmatch(image)


def test_no_password_has_a_default() -> None:
    """Each is required, made by `deploy.passwords`, and none is written down."""
    text = (ROOT / "deploy" / "compose.yaml").read_text()
    assert {*REQUIRED.findall(text)} == {*passwords.PASSWORDS}
    for name in passwords.PASSWORDS:
        assert text.count("${" + name) == len(re.findall(r"\$\{" + name + r":\?", text))
    for container in CONTAINERS.values():
        for setting, value in container.get("environment", {}).items():
            if "PASSWORD" in setting or setting.endswith("_URL"):
                secret = urlsplit(REQUIRED.sub("REQUIRED", value)).password if setting.endswith("_URL") else value
                assert secret == "REQUIRED" or REQUIRED.fullmatch(str(secret)), setting
    assert not re.search(r"PASSWORD '", (ROOT / "deploy" / "postgres" / "init.sql").read_text())


def test_each_process_has_its_own_logins_and_no_others() -> None:
    assert not any("_URL" in setting for setting in CONTAINERS["pages"]["environment"])
    for name in SERVICES:
        environment = CONTAINERS[name]["environment"]
        urls = {
            setting: urlsplit(REQUIRED.sub(r"\1", url)) for setting, url in environment.items() if "_URL" in setting
        }
        broker_url = urls.pop("AMQP_URL", None)
        ((_, database_url),) = urls.items()
        assert (database_url.username, database_url.password) == (f"local_{name}", f"{name.upper()}_PASSWORD")
        assert (broker_url is not None) == (name in broker.PROCESSES)
        if broker_url:
            assert (broker_url.username, broker_url.password) == (name, broker.setting(name))


def test_who_reaches_whom() -> None:
    """The two servers know nothing of each other; the broker is reached by relay and consumer only, and from inside."""
    assert reached_from("rabbitmq") == {"relay", "consumer"}
    assert reached_from("postgres") == CONTAINERS.keys() - {"certificates", "postgres", "rabbitmq", *OPTIONAL}
    assert not reached_from("certificates")
    assert reached_from("prometheus") == {*PROCESSES, "grafana"}
    assert [name for name, network in COMPOSE["networks"].items() if not (network or {}).get("internal")] == [
        "services",
        "watching",
    ]
    assert [name for name, container in CONTAINERS.items() if "watching" in container["networks"]] == ["grafana"]
    assert {name for name, container in CONTAINERS.items() if "services" in container["networks"]} == {*PROCESSES}
    assert not any("ports" in CONTAINERS[server] for server in ("postgres", "rabbitmq"))


def test_each_process_has_its_own_key_and_no_others() -> None:
    """Only who makes them sees the CA's key, or anything twice; what is mounted is what the settings name."""

    def mounted(name: str) -> dict[str, str]:
        volumes = [it.split(":") for it in CONTAINERS[name].get("volumes", ()) if isinstance(it, str)]
        return {volume: ":".join(rest) for volume, *rest in volumes if volume.startswith("certificates-")}

    parts = {"ca", "people", *PROCESSES}
    assert mounted("certificates") == {f"certificates-{part}": f"/certificates/{part}" for part in parts}
    for name in CONTAINERS.keys() - {"certificates"}:
        own = {f"certificates-{name}": f"/certificates/{name}:ro"} if name in PROCESSES else {}
        assert mounted(name) == own, name
    for name in PROCESSES:
        environment, files = CONTAINERS[name]["environment"], ("own.pem", "own-key.pem", "ca.pem")
        settings = ("TLS_CERTIFICATE_FILE", "TLS_KEY_FILE", "TLS_CA_FILE")
        assert [environment[setting] for setting in settings] == [f"/certificates/{name}/{file}" for file in files]
        *_, checked = CONTAINERS[name]["healthcheck"]["test"]
        host, _, port = checked.removeprefix("https://").rpartition(":")
        assert host in certificates.PROCESSES["reader/pages" if name == "pages" else f"service/{name}"]
        assert environment[f"{name.upper()}_LISTEN"] == f"0.0.0.0:{port}"
        assert CONTAINERS[name]["depends_on"]["certificates"] == {"condition": "service_healthy"}


def test_the_parts_of_certificates_are_whole(tmp_path: Path) -> None:
    """As containers see them: each identity is one, and none sees the CA's key."""
    certificates.make_apart(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.pem")}
    for name in PROCESSES:
        Credentials(*(str(tmp_path / name / file) for file in ("own.pem", "own-key.pem", "ca.pem")))
    assert (tmp_path / "people" / "operator-kim-key.pem").exists()
    assert [file.parent.name for file in tmp_path.rglob("ca-key.pem")] == ["ca"]
    certificates.make_apart(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.pem")} == before


def test_passwords_are_made_once(tmp_path: Path) -> None:
    """They are all different, for their owner only, and stay; one that is missing is added."""
    passwords.make(tmp_path)
    env, definitions = tmp_path / ".env", tmp_path / "broker-definitions.json"
    made = dict(line.split("=", 1) for line in env.read_text().splitlines())
    assert made.keys() == {*passwords.PASSWORDS}
    assert len(set(made.values())) == len(made)
    assert env.stat().st_mode & 0o777 == 0o600
    assert not any(password in definitions.read_text() for password in made.values())

    first, *others = env.read_text().splitlines(keepends=True)
    env.write_text("# mine\nLOG_LEVEL=DEBUG\n" + "".join(others))
    passwords.make(tmp_path)
    again = env.read_text()
    assert again.startswith("# mine\nLOG_LEVEL=DEBUG\n" + "".join(others))
    assert again.splitlines()[-1].split("=")[0] == first.split("=")[0]
    assert {user["name"] for user in json.loads(definitions.read_text())["users"]} == {*broker.PROCESSES}


def test_the_second_cell_is_as_the_first() -> None:
    """But for its server, its name, and what only somebody on this machine wants; the rest finds both by one file."""
    listed = cells.parse((ROOT / "deploy" / "cells.toml").read_text()).by_name
    assert listed.keys() == {"default", "cell-2"}
    assert TWO_CELLS["services"].keys() - SECOND.keys() == {"purchases", "relay", "consumer", "pages", "prometheus"}
    assert SECOND.keys() == {f"{name}-2" for name in ("postgres", "migrate-purchases", "purchases", "relay")}
    own = re.compile(r"\b(postgres|migrate-purchases|purchases|relay)-2\b(?=[:/\"]|$)")
    for name, second in SECOND.items():
        kind = name.removesuffix("-2")
        first = CONTAINERS[kind] | {"environment": dict(CONTAINERS[kind]["environment"])}
        overlay = TWO_CELLS["services"].get(kind, {})
        first["environment"] |= overlay.get("environment", {})
        first["volumes"] = [*first.get("volumes", ()), *overlay.get("volumes", ())]
        second = second | {"environment": dict(second["environment"]), "volumes": second.get("volumes", [])}
        for it in (first, second):
            it.pop("ports", None)
            it["environment"] = {key: it["environment"][key] for key in it["environment"] if "_TARGET" not in key}
        if kind in ("purchases", "relay"):
            cell = second["environment"].pop("CELL"), first["environment"].pop("CELL")
            assert cell == ("cell-2", "default")
            address = listed["cell-2"]._asdict()[kind]
            assert address.partition(":")[0] == name
            assert address.partition(":")[2] == second["environment"][f"{kind.upper()}_LISTEN"].partition(":")[2]
            assert name in certificates.PROCESSES[f"service/{kind}"]
        assert json.loads(own.sub(r"\1", json.dumps(second))) == first, name
    for name in ("purchases", "consumer", "pages"):
        assert TWO_CELLS["services"][name]["environment"]["CELLS_FILE"] == "/cells.toml"
    command, _, other = CONTAINERS["prometheus"]["command"][0].rpartition("/")
    read, read_2 = (
        yaml.safe_load((ROOT / "deploy" / "prometheus" / file).read_text())
        for file in (other, TWO_CELLS["services"]["prometheus"]["command"][0].removeprefix(f"{command}/"))
    )
    for one, two in zip(read["scrape_configs"], read_2["scrape_configs"], strict=True):
        (targets,), (all_targets,) = ([it["targets"] for it in job["static_configs"]] for job in (one, two))
        per_cell = [target.replace(":", "-2:") for target in targets if one["job_name"] in ("purchases", "relay")]
        assert all_targets == targets + per_cell


def test_who_looks_is_known() -> None:
    """The pages are beyond their machine: they want tokens, which the services take, too."""
    environment = {name: CONTAINERS[name]["environment"] for name in PROCESSES}
    everywhere = {"JWT_ISSUER": "${JWT_ISSUER:-}", "JWT_AUDIENCE": "${JWT_AUDIENCE:-}"}
    everywhere["JWT_KEYS_FILE"] = "${JWT_ISSUER:+/identity-provider/keys.json}"
    for name in PROCESSES:
        assert everywhere.items() <= environment[name].items()
        assert "./identity-provider:/identity-provider:ro" in CONTAINERS[name]["volumes"]
    called = {name for name in environment["pages"] if name.endswith("_TARGET")}
    assert called == {f"{name.upper()}_TARGET" for name in PAGES.calls}
    declared = {it.name for it in settings_of(ServeSettings)}
    assert {name for name in environment["pages"] if name.startswith(("PAGES_", "JWT_", "OTEL_"))} <= declared


def test_who_watches_is_told_of_all() -> None:
    """Prometheus reads all pages and has the alarms; Grafana finds it and the dashboard. None starts unasked."""
    read = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yaml").read_text())
    targets = {it["job_name"]: it["static_configs"][0]["targets"] for it in read["scrape_configs"]}
    for name in PROCESSES:
        _, _, port = CONTAINERS[name]["environment"][f"{name.upper()}_METRICS_LISTEN"].rpartition(":")
        assert targets.pop(name) == [f"{name}:{port}"]
    assert not targets
    assert [(ROOT / "deploy" / "prometheus" / rules).exists() for rules in read["rule_files"]] == [True]
    optional = {name: container["profiles"] for name, container in CONTAINERS.items() if "profiles" in container}
    assert optional == OPTIONAL
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    told = Grafana(Path("/nowhere"), Path("/nowhere"), Path("/nowhere")).environ("prometheus:9090")
    environment = CONTAINERS["grafana"]["environment"]
    assert environment["PROMETHEUS"] == told["PROMETHEUS"]
    for file in provisioning.rglob("*.yaml"):
        variables = set(re.findall(r"\$(\w+)", re.sub(r"(?m)^#.*", "", file.read_text())))
        assert variables
        assert variables <= environment.keys() & told.keys()
    mounted = dict(volume.split(":")[:2] for volume in CONTAINERS["grafana"]["volumes"])
    assert mounted["./grafana/dashboards"] == environment["DASHBOARDS"]
    assert Path(told["DASHBOARDS"], "retail-backbone.json").exists()
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
