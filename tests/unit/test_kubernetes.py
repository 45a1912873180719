"""The manifests say what the code says: ports, settings, probes, grace, who talks to whom, what a container may do."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from analytics_svc import settings as analytics
from chassis import cells, settings
from chassis.grpc_server import DRAIN_TIMEOUT_S
from deploy import broker, certificates
from deploy.local.services import PAGES, PURCHASES, SERVICES, STACK, Service
from pages_svc import settings as pages
from purchases_svc import settings as purchases
from relay_svc import settings as relay
from tests.conftest import ROOT

HERE = ROOT / "deploy" / "kubernetes"
DECLARED = {
    "purchases": purchases.ServeSettings,
    "relay": relay.ServeSettings,
    "consumer": analytics.ConsumeSettings,
    "analytics": analytics.ServeSettings,
    "pages": pages.ServeSettings,
    "migrate-purchases": purchases.MigrateSettings,
    "migrate-analytics": analytics.MigrateSettings,
}
SPARE_S = 5  # of the time that a process has for its end


def documents(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("*.yaml")):
        yield from (document for document in yaml.safe_load_all(file.read_text()) if document)


BASE = list(documents(HERE / "base"))
OVERLAYS = ("single-node", "production", "two-cells")
ALL = [document for folder in ("base", *OVERLAYS) for document in documents(HERE / folder)]
WORKLOADS = [it for it in ALL if it["kind"] in ("Deployment", "StatefulSet", "Job")]
(GENERATED,) = [it["configMapGenerator"] for it in BASE if it["kind"] == "Kustomization"]
SHARED = dict(literal.split("=", 1) for literal in GENERATED[0]["literals"])

each_service = pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
each_workload = pytest.mark.parametrize("workload", WORKLOADS, ids=lambda it: it["metadata"]["name"])


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [it for it in BASE if it["kind"] == kind and it["metadata"]["name"] == name]
    return found


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(workload)["containers"]
    found: dict[str, Any] = only
    return found


def environment(workload: dict[str, Any]) -> dict[str, Any]:
    return {it["name"]: it.get("value", it.get("valueFrom")) for it in container(workload).get("env", ())}


@each_service
def test_ports(service: Service) -> None:
    """Those that everybody knows: in the settings, the container, the service and for Prometheus."""
    deployment = named("Deployment", service.name)
    ports = {it["name"]: it["containerPort"] for it in container(deployment)["ports"]}
    assert ports == {"grpc": service.port, "metrics": service.metrics_port}
    env, name = environment(deployment), service.name.upper()
    assert env[f"{name}_LISTEN"] == f"0.0.0.0:{service.port}"
    assert env[f"{name}_METRICS_LISTEN"] == f"0.0.0.0:{service.metrics_port}"
    assert {it["port"] for it in named("Service", service.name)["spec"]["ports"]} == set(ports.values())
    assert named("Service", service.name)["spec"]["clusterIP"] == "None", "clients balance; none is balanced for"
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(service.metrics_port)
    assert SHARED[f"{name}_TARGET"] == f"dns:///{service.name}:{service.port}"


@pytest.mark.parametrize("name", DECLARED)
def test_settings(name: str) -> None:
    """Each that is set exists, each that must be set is; nothing secret is written down."""
    kind = "Job" if name.startswith("migrate") else "Deployment"
    workload = named(kind, name)
    known = {it.name: it for cls in DECLARED.values() for it in settings.settings_of(cls)}
    declared = {it.name: it for it in settings.settings_of(DECLARED[name])}
    env = environment(workload)
    assert env.keys() <= declared.keys()
    assert SHARED.keys() <= known.keys() | {f"{service.name.upper()}_TARGET" for service in SERVICES}
    assert {name for name in known if name.startswith("OTEL_")} >= {name for name in SHARED if name.startswith("OTEL_")}
    must = {it.name for it in declared.values() if it.default is None}
    assert must <= env.keys() | SHARED.keys()
    for setting, value in env.items():
        assert setting.endswith("_URL") == isinstance(value, dict), setting
        if setting.endswith("_URL"):
            assert value["secretKeyRef"]["key"] == "url"
    assert container(workload)["envFrom"] == [{"configMapRef": {"name": "retail-settings"}}]


def test_each_has_secrets_of_its_own() -> None:
    secrets = [
        value["secretKeyRef"]["name"]
        for name in DECLARED
        for value in environment(named("Job" if name.startswith("migrate") else "Deployment", name)).values()
        if isinstance(value, dict)
    ]
    assert len(set(secrets)) == len(secrets) == len(DECLARED.keys() - {"pages"}) + len(broker.PROCESSES)
    page = (HERE / "README.md").read_text()
    assert {secret for secret in secrets if f"`{secret}`" not in page} == set()


@each_service
def test_commands_and_probes(service: Service) -> None:
    """Ready is SERVING; alive is any answer. Both ask with the process's own certificate, by a name that is in it."""
    deployment = named("Deployment", service.name)
    assert container(deployment)["args"] == [f"retail-{service.command[0].removesuffix('_svc')}", service.command[1]]
    asked = f"localhost:{service.port}"
    assert container(deployment)["readinessProbe"]["exec"]["command"] == ["python", "healthcheck.py", asked]
    alive = ["python", "healthcheck.py", "--alive", asked]
    assert container(deployment)["livenessProbe"]["exec"]["command"] == alive
    assert "localhost" in certificates.PROCESSES[f"service/{service.name}"]
    (issued,) = [it for it in ALL if it["kind"] == "Certificate" and it["metadata"]["name"] == service.name]
    assert {"localhost", service.name} <= {*issued["spec"]["dnsNames"]}
    assert issued["spec"]["uris"] == [f"spiffe://{SHARED['TRUST_DOMAIN']}/service/{service.name}"]
    mounted = {it["name"]: it for it in container(deployment)["volumeMounts"]}["certificates"]
    assert "subPath" not in mounted, "what is mounted so is never renewed"
    (volume,) = [it for it in pod(deployment)["volumes"] if it["name"] == "certificates"]
    assert volume["secret"]["secretName"] == issued["spec"]["secretName"]
    for name, key in (("CERTIFICATE", "tls.crt"), ("KEY", "tls.key"), ("CA", "ca.crt")):
        assert SHARED[f"TLS_{name}_FILE"] == f"{mounted['mountPath']}/{key}"


def test_the_pages() -> None:
    """They read, and know whom they serve; they call the services and no database. Probes ask as browsers do."""
    deployment = named("Deployment", "pages")
    env, ports = environment(deployment), {it["name"]: it["containerPort"] for it in container(deployment)["ports"]}
    assert ports == {"https": PAGES.port, "metrics": PAGES.metrics_port}
    assert (env["PAGES_LISTEN"], env["PAGES_METRICS_LISTEN"]) == ("0.0.0.0:8080", "0.0.0.0:9468")
    assert container(deployment)["args"] == ["retail-pages", "serve"]
    for probe in ("readinessProbe", "livenessProbe"):
        assert container(deployment)[probe]["httpGet"] == {"scheme": "HTTPS", "port": "https", "path": "/health"}
    (issued,) = [it for it in ALL if it["kind"] == "Certificate" and it["metadata"]["name"] == "pages"]
    assert issued["spec"]["uris"] == [f"spiffe://{SHARED['TRUST_DOMAIN']}/reader/pages"]
    assert PAGES.calls and all(SHARED[f"{name.upper()}_TARGET"] for name in PAGES.calls)
    policy = named("NetworkPolicy", "pages")["spec"]
    called = {
        it["to"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/name"]: it["ports"][0]["port"]
        for it in policy["egress"]
    }
    assert called == {service.name: service.port for service in SERVICES if service.name in PAGES.calls}
    (unable,) = named("NetworkPolicy", "databases")["spec"]["podSelector"]["matchExpressions"]
    assert (unable["operator"], unable["values"]) == ("NotIn", ["pages"])


@pytest.mark.parametrize("name", [program.name for program in STACK])
def test_people_are_known_by_their_tokens(name: str) -> None:
    """Each that they call, by the pages or not, has the keys of who signs them in, in a directory that is followed."""
    mounted = {it["name"]: it for it in container(named("Deployment", name))["volumeMounts"]}["identity-provider"]
    assert SHARED["JWT_KEYS_FILE"] == f"{mounted['mountPath']}/keys.json"
    assert "subPath" not in mounted
    assert SHARED["JWT_ISSUER"] and SHARED["JWT_AUDIENCE"]


@each_service
def test_there_is_time_to_end_and_never_too_few(service: Service) -> None:
    deployment = named("Deployment", service.name)
    assert pod(deployment)["terminationGracePeriodSeconds"] >= DRAIN_TIMEOUT_S + SPARE_S
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert deployment["spec"]["replicas"] >= 2
    assert named("PodDisruptionBudget", service.name)["spec"]["maxUnavailable"] == 1
    assert len(pod(deployment)["topologySpreadConstraints"]) == 2


@each_workload
def test_no_container_may_do_more_than_it_has_to(workload: dict[str, Any]) -> None:
    assert container(workload)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    context = pod(workload)["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    if container(workload)["image"] == "retail-backbone":
        (uid,) = re.findall(r"^USER (\d+)$", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
        assert context["runAsUser"] == int(uid)
    assert pod(workload)["automountServiceAccountToken"] is False
    assert pod(workload)["enableServiceLinks"] is False
    assert container(workload)["resources"]["limits"].keys() == {"memory"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod(workload).keys()
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert ("app.kubernetes.io/part-of" in labels) == (container(workload)["image"] == "retail-backbone")


@each_service
def test_who_talks_to_whom(service: Service) -> None:
    """As deploy/local/services.py has it: a process is let in to whom it calls, and to nobody else."""
    policy = named("NetworkPolicy", service.name)["spec"]
    calls, monitoring = policy["ingress"]
    assert calls["ports"] == [{"protocol": "TCP", "port": "grpc"}]
    assert monitoring["ports"] == [{"protocol": "TCP", "port": "metrics"}]
    callers = {
        it["podSelector"]["matchLabels"]["app.kubernetes.io/name"] for it in calls["from"] if "podSelector" in it
    }
    assert callers == {other.name for other in STACK if service.name in other.calls}
    assert all("podSelector" in it or "namespaceSelector" in it for it in calls["from"])
    called = {
        (it["to"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/name"], it["ports"][0]["port"])
        for it in policy.get("egress", ())
        if "to" in it
    }
    assert called == {(other.name, other.port) for other in SERVICES if other.name in service.calls}
    broker_ports = [it["ports"][0]["port"] for it in policy.get("egress", ()) if "to" not in it]
    assert broker_ports == ([5671] if service.uses_broker else [])


def test_what_is_not_allowed_is_denied() -> None:
    denied = named("NetworkPolicy", "nothing-else")["spec"]
    assert denied["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in denied
    ((dns,),) = ([rule["ports"] for rule in denied["egress"]],)
    assert {port["port"] for port in dns} == {53}


def test_migrations_run_first() -> None:
    for database in (PURCHASES.name, "analytics"):
        job = named("Job", f"migrate-{database}")
        assert container(job)["args"] == [f"retail-{database}", "migrate"]
        assert job["metadata"]["annotations"]["argocd.argoproj.io/hook"] == "PreSync"
        assert "pre-upgrade" in job["metadata"]["annotations"]["helm.sh/hook"]


def test_overlays_name_what_there_is() -> None:
    for overlay in OVERLAYS:
        (kustomization,) = [it for it in documents(HERE / overlay) if it["kind"] == "Kustomization"]
        for resource in kustomization["resources"]:
            assert (HERE / overlay / resource).exists()
        assert [it["name"] for it in kustomization["images"]] == ["retail-backbone"]
    scaled = {
        it["metadata"]["name"]: it["spec"]["metrics"][0]
        for it in documents(HERE / "production")
        if it["kind"] == "HorizontalPodAutoscaler"
    }
    assert scaled["purchases"]["resource"]["name"] == "cpu"
    metric = scaled["consumer"]["external"]["metric"]["name"]
    assert f"`{metric}`" in (ROOT / "docs" / "metrics.md").read_text()


def test_two_cells() -> None:
    """The second has names, secrets and certificates of its own for all that a cell has; the rest is told of both."""
    listed = cells.parse((HERE / "two-cells" / "cells.toml").read_text()).by_name
    assert listed.keys() == {"default", "cell-2"}
    per_cell = [service for service in SERVICES if service.per_cell]
    issued = {it["metadata"]["name"]: it["spec"] for it in documents(HERE / "two-cells") if it["kind"] == "Certificate"}
    for service in per_cell:
        for cell, name in (("default", service.name), ("cell-2", f"{service.name}-2")):
            assert listed[cell]._asdict()[service.name] == f"dns:///{name}:{service.port}"
        own = issued[f"{service.name}-2"]
        assert {"localhost", f"{service.name}-2"} <= {*own["dnsNames"]}
        assert own["uris"] == [f"spiffe://{SHARED['TRUST_DOMAIN']}/service/{service.name}"]
    (second,) = documents(HERE / "two-cells" / "second")
    deleted = second["patches"][0]["target"]["name"].split("|")
    kept = {it["metadata"]["name"] for it in BASE if "metadata" in it} - {*deleted}
    assert kept == {*(service.name for service in per_cell), "migrate-purchases"}
    relabelled = {(it["target"]["kind"], it["target"]["name"]) for it in second["patches"][1:]}
    assert relabelled == {
        (it["kind"], it["metadata"]["name"]) for it in BASE if it.get("metadata", {}).get("name") in kept
    }
    for patch in second["patches"][1:]:
        for change in yaml.safe_load(patch["patch"]):
            assert f"{patch['target']['name']}-2" in change["value"] or change["value"] == "retail-purchases-2-owner"
    (overlay,) = [it for it in documents(HERE / "two-cells") if it["kind"] == "Kustomization"]
    told = {it["target"]["name"]: it["patch"] for it in overlay["patches"] if it["target"]["kind"] == "Deployment"}
    assert {name for names, patch in told.items() if "CELLS_FILE" in patch for name in names.split("|")} == {
        "purchases",
        "purchases-2",
        "consumer",
        "pages",
    }
    (callers,) = [it["target"]["name"] for it in overlay["patches"] if it["target"]["kind"] == "NetworkPolicy"]
    assert {*callers.split("|")} == {it.name for it in STACK if {"purchases", "relay"} <= {*it.calls}}
    page = (HERE / "README.md").read_text()
    assert all(f"`retail-{name}`" in page for name in ("purchases-2-database", "relay-2-database", "purchases-2-owner"))
