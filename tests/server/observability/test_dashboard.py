"""The dashboard in docker/observe: its metrics and labels exist, and a real Prometheus answers all of its queries."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from server.observability.metrics import METRICS, sample_names
from steering_vectors.profiles.files import save_profile
from steering_vectors.profiles.gate import Gate
from tests.support.running import HeldEngine
from tests.support.serving import demo_engine, live_server, random_profile, save_profiles, until

ROOT = Path(__file__).resolve().parents[3]
OBSERVE = ROOT / "docker" / "observe"
DASHBOARD: dict[str, Any] = json.loads((OBSERVE / "grafana" / "dashboards" / "trimtab.json").read_text())
VARIABLES = {"$__rate_interval": "1m", "$profile": ".*"}
RESULT_TYPES = {"timeseries": "matrix", "heatmap": "matrix", "table": "vector"}
OF_THE_PROCESS = {"process_resident_memory_bytes"}
KEY = "swordfish"


@dataclass(frozen=True)
class Query:
    panel: str
    kind: str
    text: str


QUERIES = [
    Query(panel["title"], panel["type"], target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
]


def metric_names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:trimtab|process)_\w+", text))


def test_every_metric_of_the_dashboard_exists() -> None:
    known = {sample for name in METRICS for sample in sample_names(name)} | OF_THE_PROCESS
    named = set().union(*(metric_names(query.text) for query in QUERIES))
    assert named <= known
    assert len(named) > 25


def test_every_label_of_the_dashboard_exists() -> None:
    names = {sample: name for name in METRICS for sample in sample_names(name)}
    for query in QUERIES:
        declared = {
            label for sample in metric_names(query.text) & names.keys() for label in METRICS[names[sample]].labels
        }
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query.text) for label in group.split(",")}
        chosen = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!=|=)", query.text))
        assert grouped | chosen <= declared | {"le"}, query


def test_the_dashboard_shows_steering() -> None:
    named = set().union(*(metric_names(query.text) for query in QUERIES))
    steering = {name for name in METRICS if "profile" in METRICS[name].labels or "steer" in name or "gate" in name}
    assert {sample_names(name)[0] for name in steering} <= named


def test_panels_are_described_and_have_ids_of_their_own() -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in panels)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert {panel["type"] for panel in panels} == RESULT_TYPES.keys()


def test_compose_mounts_what_is_there() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    observing = {name: one for name, one in compose["services"].items() if one.get("profiles") == ["observe"]}
    assert observing.keys() == {"prometheus", "grafana"}
    for service in observing.values():
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", service["image"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (ROOT / "docker" / source).exists() if source.startswith(".") else source in compose["volumes"]
    scraped = yaml.safe_load((OBSERVE / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scraped["static_configs"] == [{"targets": ["trimtab:8000"]}]
    provisioning = OBSERVE / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    used = {target["datasource"]["uid"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])}
    assert used == {source["uid"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "trimtab.yaml").read_text())["providers"]
    assert any(volume.endswith(f":{provider['options']['path']}:ro") for volume in observing["grafana"]["volumes"])


@pytest.fixture(scope="module")
def engine() -> Iterator[HeldEngine]:
    with demo_engine(slots=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: HeldEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server that has had requests of every kind, and that requires a key."""
    directory, identity = tmp_path_factory.mktemp("profiles"), engine.info.identity
    save_profiles(directory, identity, "warm", "concise", unit=0.05)
    direction = torch.randn(identity.hidden_size, generator=torch.Generator().manual_seed(3))
    gate = Gate(1, direction, 2.0, "above")
    save_profile(random_profile(identity, "gated", seed=5, unit=0.05, gate=gate), directory)
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n")
    with live_server(engine, directory, api_key_file=keys) as client:
        assert client.post("/generate", json={"prompt": "a"}).status_code == 401
        client.headers["authorization"] = f"Bearer {KEY}"
        for steering in ("warm@0.5", "concise@-0.5+warm@1", "gated"):
            body = {"prompt": "Bread is", "max_tokens": 4, "steering": steering, "ignore_eos": True}
            client.post("/generate", json=body).raise_for_status()
        beyond = {"prompt": "Bread is", "max_tokens": 4, "steering": "warm@99"}
        assert client.post("/generate", json=beyond).json()["error"]["code"] == "strength_out_of_range"
        yield client


@contextmanager
def prometheus(target: str, directory: Path) -> Iterator[httpx.Client]:
    """Debian's Prometheus, which scrapes this address with the key."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("Prometheus is not installed: apt-get install prometheus")
    (directory / "key").write_text(KEY)
    job = {
        "job_name": "trimtab",
        "static_configs": [{"targets": [target]}],
        "authorization": {"credentials_file": str(directory / "key")},
    }
    configuration = {"global": {"scrape_interval": "250ms", "scrape_timeout": "250ms"}, "scrape_configs": [job]}
    (directory / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        binary,
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=error",
    ]
    with subprocess.Popen(command) as process, httpx.Client(base_url=f"http://{address}/api/v1", timeout=20) as api:
        try:
            until(lambda: _answers(api))
            yield api
        finally:
            process.terminate()


def _answers(api: httpx.Client) -> bool:
    try:
        targets = api.get("/targets").json()["data"]["activeTargets"]
    except (httpx.TransportError, ValueError, KeyError):
        return False
    return bool(targets) and targets[0]["health"] == "up"


@pytest.mark.slow
def test_prometheus_answers_every_query_of_the_dashboard(client: httpx.Client, tmp_path: Path) -> None:
    with prometheus(f"127.0.0.1:{client.base_url.port}", tmp_path) as api:
        for query in QUERIES:
            text = query.text
            for variable, text_of_it in VARIABLES.items():
                text = text.replace(variable, text_of_it)
            found: dict[str, Any] = {}

            def answered(kind: str = query.kind, text: str = text, found: dict[str, Any] = found) -> bool:
                if RESULT_TYPES[kind] == "vector":
                    answer = api.get("/query", params={"query": text}).json()
                else:
                    now = float(api.get("/query", params={"query": "time()"}).json()["data"]["result"][0])
                    span = {"start": now - 5, "end": now, "step": 1}
                    answer = api.get("/query_range", params={"query": text, **span}).json()
                assert answer["status"] == "success", answer
                found.update(answer["data"], query=text)
                return bool(answer["data"]["result"])

            until(answered)
            assert found["resultType"] == RESULT_TYPES[query.kind], query
            points = [point for one in found["result"] for point in one.get("values", [one.get("value")])]
            assert points
            assert all(isinstance(float(number), float) for _, number in points)
            if query.kind == "heatmap":
                assert all("le" in one["metric"] for one in found["result"])


@pytest.mark.slow
def test_promtool_finds_no_fault(client: httpx.Client, tmp_path: Path) -> None:
    binary = shutil.which("promtool")
    if binary is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    text = client.get("/metrics").text
    done = subprocess.run([binary, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "trimtab_" in line]
    assert ours == []
    checked = subprocess.run(
        [binary, "check", "config", str(OBSERVE / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
