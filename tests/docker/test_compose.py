"""The containers of docker/compose.yaml can write, and may do, no more than they need."""

from __future__ import annotations

import re

import pytest

from server.http.listener import LAST_WORDS_SECONDS
from server.settings import unknown_variables
from tests.docker.files import DOCKER, SERVICES, default

TRIMTAB = SERVICES["trimtab"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "network_mode", "pid", "userns_mode"} & service.keys()
    assert re.fullmatch(r"\d+[mg]", default(service["mem_limit"]))
    assert int(default(service["pids_limit"])) >= 256


@pytest.mark.parametrize("name", SERVICES)
def test_limits_are_variables(name: str) -> None:
    for limit in ("mem_limit", "pids_limit"):
        assert re.fullmatch(r"\$\{[A-Z_]+:-\w+\}", SERVICES[name][limit])


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_this_machine_only(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


def test_what_is_mounted_can_be_written_only_where_something_is_stored() -> None:
    modes = {}
    for name, service in SERVICES.items():
        for mount in service["volumes"]:
            _, target, *mode = default(mount).split(":")
            modes[f"{name}:{target}"] = mode == ["ro"]
    assert modes == {
        "trimtab:/models": False,
        "trimtab:/profiles": True,
        "trimtab:/feedback": False,
        "prometheus:/etc/prometheus/prometheus.yml": True,
        "prometheus:/prometheus": False,
        "grafana:/etc/grafana/provisioning": True,
        "grafana:/var/lib/grafana/dashboards": True,
        "grafana:/var/lib/grafana": False,
    }


@pytest.mark.parametrize("name", ["trimtab", "grafana"])
def test_temporary_files_have_a_place_of_limited_size(name: str) -> None:
    assert [default(mount) for mount in SERVICES[name]["tmpfs"]] == ["/tmp:mode=1777,size=256m"]


def test_a_server_without_swap_is_ended_at_its_memory_limit() -> None:
    assert TRIMTAB["memswap_limit"] == TRIMTAB["mem_limit"]


def test_readiness_is_asked_apart_from_liveness() -> None:
    assert TRIMTAB["healthcheck"]["test"] == ["CMD", "python", "/app/healthcheck.py", "/ready"]


def test_the_drain_ends_before_docker_kills() -> None:
    drain, grace = float(TRIMTAB["environment"]["TRIMTAB_DRAIN_SECONDS"]), TRIMTAB["stop_grace_period"]
    assert drain + LAST_WORDS_SECONDS + 3 <= float(grace.removesuffix("s"))


def test_all_variables_are_settings() -> None:
    assert unknown_variables(TRIMTAB["environment"]) == []


def test_the_published_port_is_the_one_that_the_server_listens_on() -> None:
    assert [port.rsplit(":", 1)[1] for port in TRIMTAB["ports"]] == [TRIMTAB["environment"]["TRIMTAB_PORT"]]


def test_observing_is_a_profile_of_its_own() -> None:
    assert {name for name, service in SERVICES.items() if service.get("profiles") == ["observe"]} == {
        "prometheus",
        "grafana",
    }
    for name in ("prometheus", "grafana"):
        sources = [mount.split(":")[0] for mount in SERVICES[name]["volumes"] if mount.startswith("./")]
        assert sources
        assert all((DOCKER / source).exists() for source in sources)
