"""The manifests of deploy/kubernetes are valid, and ask, confine and scale the server as it is made."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.access.keys import read_keys
from server.http.listener import LAST_WORDS_SECONDS
from server.observability.metrics import METRICS, sample_names
from server.settings import unknown_variables
from tests.docker.files import DOCKERFILE, ROOT
from tests.docker.files import SERVICES as COMPOSED

FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.30", "1.37")  # the first with a preStop sleep by default, and the newest
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text(encoding="utf-8"))
MANIFESTS: dict[str, dict[str, Any]] = {
    path.name: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.name != "kustomization.yaml"
}
POD: dict[str, Any] = MANIFESTS["deployment.yaml"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENVIRONMENT: dict[str, str] = {one["name"]: one["value"] for one in CONTAINER["env"]}
LABELS: dict[str, str] = MANIFESTS["deployment.yaml"]["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_follow_the_schema(name: str, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="it comes with the extra dev")
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_the_schema_would_find_a_mistake() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="it comes with the extra dev")
    wrong = {**MANIFESTS["service.yaml"], "specs": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_all_manifests_are_applied_but_the_secret() -> None:
    assert set(KUSTOMIZATION["resources"]) == MANIFESTS.keys() - {"secret.yaml"}


def test_the_image_is_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert CONTAINER["image"] == f"trimtab:{version}"
    assert [(image["name"], image["newTag"]) for image in KUSTOMIZATION["images"]] == [("trimtab", version)]


def test_the_container_is_confined() -> None:
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": COMPOSED["trimtab"]["cap_drop"]},
    }
    context = POD["securityContext"]
    assert context["runAsNonRoot"] is True
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}" in DOCKERFILE
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert POD["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & POD.keys()
    assert "memory" in CONTAINER["resources"]["limits"]


def test_only_what_is_stored_can_be_written() -> None:
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in CONTAINER["volumeMounts"]}
    assert mounts == {"/profiles": True, "/keys": True, "/models": False, "/tmp": False}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    claims = [one["persistentVolumeClaim"]["claimName"] for one in POD["volumes"] if "persistentVolumeClaim" in one]
    assert claims == [MANIFESTS["profiles.yaml"]["metadata"]["name"]]
    assert all("sizeLimit" in one["emptyDir"] for one in POD["volumes"] if "emptyDir" in one)


def test_variables_are_settings_and_links_of_services_set_none() -> None:
    assert unknown_variables(ENVIRONMENT) == []
    assert POD["enableServiceLinks"] is False
    assert [port["containerPort"] for port in CONTAINER["ports"]] == [int(ENVIRONMENT["TRIMTAB_PORT"])]


def test_liveness_is_asked_apart_from_readiness() -> None:
    asked = {kind: CONTAINER[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert asked == {
        "startup": {"path": "/ready", "port": "http"},
        "liveness": {"path": "/health", "port": "http"},
        "readiness": {"path": "/ready", "port": "http"},
    }


def test_the_drain_ends_before_the_pod_is_killed() -> None:
    before = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = before + float(ENVIRONMENT["TRIMTAB_DRAIN_SECONDS"]) + LAST_WORDS_SECONDS + 3
    assert needed <= POD["terminationGracePeriodSeconds"]


def test_replicas_follow_a_metric_that_exists() -> None:
    spec = MANIFESTS["autoscaler.yaml"]["spec"]
    deployment = MANIFESTS["deployment.yaml"]
    assert spec["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }
    (metric,) = spec["metrics"]
    assert metric["pods"]["metric"]["name"] in {sample for name in METRICS for sample in sample_names(name)}
    assert metric["pods"]["target"]["type"] == "AverageValue"
    assert "replicas" not in deployment["spec"]


def test_selectors_find_the_pods() -> None:
    assert MANIFESTS["deployment.yaml"]["spec"]["selector"]["matchLabels"] == LABELS
    assert MANIFESTS["service.yaml"]["spec"]["selector"] == LABELS
    assert MANIFESTS["network-policy.yaml"]["spec"]["podSelector"]["matchLabels"] == LABELS


def test_the_network_is_closed_but_for_what_is_named() -> None:
    spec = MANIFESTS["network-policy.yaml"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert all(rule["from"] and rule["ports"] == [{"protocol": "TCP", "port": "http"}] for rule in spec["ingress"])
    assert {port["port"] for rule in spec["egress"] for port in rule["ports"]} == {53, 443}


def test_the_secret_holds_a_file_of_keys_that_nobody_has(tmp_path: Path) -> None:
    secret = MANIFESTS["secret.yaml"]
    (file,) = secret["stringData"]
    assert ENVIRONMENT["TRIMTAB_API_KEY_FILE"] == f"/keys/{file}"
    (volume,) = [one for one in POD["volumes"] if "secret" in one]
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]
    (tmp_path / file).write_text(secret["stringData"][file])
    (key,) = read_keys(tmp_path / file)
    assert key.sha256 == "0" * 64
