"""What the server listens on: HTTPS with certificates made here, and unix sockets with their permissions."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import stat
import subprocess
from pathlib import Path

import httpx
import pytest

from server.chat.remote import Remote
from server.http.listener import listen_unix, listening, tls_options, url_of
from server.settings import ConfigurationError, Settings
from tests.support.running import HeldEngine
from tests.support.serving import engine_fixture, live_server, profiles_fixture

pytestmark = pytest.mark.slow

engine = engine_fixture(slots=2, context=64)
profiles = profiles_fixture("warm")
TEXT = {"prompt": "Bread is", "max_tokens": 3, "stream": True}


def openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a self-signed certificate for localhost, its key, and the key with the password `secret`."""
    folder = tmp_path_factory.mktemp("certificate")
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    made = ("-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-days", "2", "-subj", "/CN=localhost")
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", *made, "-addext", names)
    openssl("rsa", "-aes256", "-in", folder / "key.pem", "-passout", "pass:secret", "-out", folder / "locked.pem")
    return folder


def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate / "cert.pem")


def test_https(engine: HeldEngine, profiles: Path, certificate: Path) -> None:
    files = {"ssl_certfile": certificate / "cert.pem", "ssl_keyfile": certificate / "key.pem"}
    with live_server(engine, profiles, verify=trusting(certificate), **files) as client:
        assert client.base_url.scheme == "https"
        lines = client.post("/generate", json=TEXT).text.split("\n\n")
        assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 3
        with pytest.raises(httpx.ConnectError, match="self-signed certificate"):
            httpx.get(f"{client.base_url}/health")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://{client.base_url.host}:{client.base_url.port}/health")
        assert client.get("/health").status_code == 200


def test_https_for_clients_with_a_certificate_only(engine: HeldEngine, profiles: Path, certificate: Path) -> None:
    files = {"ssl_certfile": certificate / "cert.pem", "ssl_keyfile": certificate / "locked.pem"}
    known = trusting(certificate)
    known.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    options = {"ssl_keyfile_password": "secret", "ssl_ca_certs": certificate / "cert.pem"}
    with live_server(engine, profiles, verify=known, **files, **options) as client:
        assert client.post("/generate", json=TEXT).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{client.base_url}/health", verify=trusting(certificate))


@pytest.mark.parametrize(
    "files",
    [
        {"ssl_certfile": "missing.pem"},
        {"ssl_certfile": "cert.pem"},
        {"ssl_certfile": "cert.pem", "ssl_keyfile": "locked.pem"},
        {"ssl_certfile": "cert.pem", "ssl_keyfile": "locked.pem", "ssl_keyfile_password": "wrong"},
        {"ssl_certfile": "cert.pem", "ssl_keyfile": "key.pem", "ssl_ca_certs": "key.pem"},
    ],
)
def test_certificates_that_cannot_be_used_are_said_at_the_start(certificate: Path, files: dict[str, str]) -> None:
    """And nobody is asked for a password."""
    given = {name: value if name.endswith("password") else certificate / value for name, value in files.items()}
    with pytest.raises(ConfigurationError, match=r"the certificates cannot be used .*: check --ssl-certfile"):
        tls_options(Settings(**given))  # type: ignore[arg-type]


def test_a_unix_socket(engine: HeldEngine, profiles: Path, tmp_path: Path) -> None:
    path = tmp_path / "trimtab.sock"
    with live_server(engine, profiles, uds=path) as client:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert client.post("/generate", json=TEXT).status_code == 200
        assert client.get("/v1/models", headers={"host": "models.example"}).status_code == 200  # of a proxy
        with contextlib.closing(Remote(f"unix:{path}")) as remote:
            assert remote.fetch("/v1/models")["data"][0]["id"] == "demo"
        with socket.socket(socket.AF_UNIX) as connection:  # what arrives is bounded as on any other connection
            connection.connect(str(path))
            connection.sendall(b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 431 ")
    assert not path.exists()


def test_the_permissions_of_a_unix_socket_are_those_asked_for(tmp_path: Path) -> None:
    for mode in (0o600, 0o660, 0o777):
        path = tmp_path / f"{mode:o}.sock"
        with listen_unix(path, mode) as listener:
            assert stat.S_IMODE(path.stat().st_mode) == mode
            assert url_of("127.0.0.1", listener) == f"unix:{path}"


def test_a_unix_socket_replaces_none_that_is_listened_on(tmp_path: Path) -> None:
    path = tmp_path / "trimtab.sock"
    with (
        listen_unix(path, 0o600),
        pytest.raises(ConfigurationError, match=f"cannot listen on --uds {path}: another server listens there"),
        listening(Settings(uds=path)),
    ):
        pass
    assert path.is_socket()  # left behind
    with listening(Settings(uds=path)) as listener:
        assert listener.getsockname() == str(path)
    assert not path.exists()
    path.write_text("a file")
    with pytest.raises(ConfigurationError, match="in use"), listening(Settings(uds=path)):
        pass
    assert path.read_text() == "a file"
