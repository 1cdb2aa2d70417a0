"""Who may ask, and from where."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from espalier.errors import ConfigError
from espalier.serve import ServerConfig, Tls
from espalier.serve.rpc.messages import SERVICE, message

TOKEN = "0123456789abcdef"
MODELS = {"slow": Path("nowhere")}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0"}, "token"),
        ({"host": "example.org"}, "token"),
        ({"token": "short"}, "16"),
        ({"token": "with spaces in it all"}, "16"),
        ({"http_port": None, "grpc_port": None}, "neither"),
        ({"http_port": 70000}, "65535"),
        ({"http_port": 8000, "grpc_port": 8000}, "share"),
        ({"load_from": Path("/nowhere")}, "folder"),
    ],
)
def test_what_cannot_be_configured(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServerConfig(**options)


def test_the_outside_needs_a_token_or_a_word() -> None:
    ServerConfig(host="0.0.0.0", token=TOKEN)
    ServerConfig(host="0.0.0.0", insecure=True)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        ServerConfig(host=host)


def test_a_port_in_use_is_said(start: Callable[..., Any], slow: Any) -> None:
    with (
        start(MODELS) as client,
        pytest.raises(ConfigError, match=f"port {client.port}"),
        start(MODELS, http_port=client.port),
    ):
        pass


def test_the_token_is_wanted(start: Callable[..., Any], slow: Any) -> None:
    with start(MODELS, token=TOKEN) as client:
        for path in ("/v2/health/live", "/v2/health/ready", "/openapi.json"):
            assert client.get(path)[0] == 200
        assert client.send("GET", "/")[0] == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
            for path in ("/v2", "/status", "/metrics", "/v1/models", "/nowhere"):
                assert client.get(path, **headers)[0] == 401
        assert client.get("/v2", authorization=f"Bearer {TOKEN}")[0] == 200
        assert "token" in client.get("/openapi.json")[1]["components"]["securitySchemes"]
        assert client.call("ServerReady").ready
        with pytest.raises(grpc.RpcError) as caught:
            client.call("ServerMetadata")
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert client.call("ServerMetadata", metadata=(("authorization", f"Bearer {TOKEN}"),)).name == "espalier"


def test_pages_of_other_origins_are_not_answered(client: Any) -> None:
    assert client.get("/v2", origin="https://evil.example")[0] == 403
    assert client.get("/v2", origin="null")[0] == 403
    assert client.get("/v2", origin=f"http://127.0.0.1:{client.port}")[0] == 200


def test_importing_brings_neither_torch_nor_ray() -> None:
    code = (
        "import sys, espalier.serve.server\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates of it for the server (localhost) and a client."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here to make certificates with")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san")
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem")
    return folder


def test_both_sides_show_certificates(start: Callable[..., Any], slow: Any, certificates: Path) -> None:
    tls = Tls(
        certificate=certificates / "server.pem", key=certificates / "server.key", client_ca=certificates / "ca.pem"
    )
    with start(MODELS, tls=tls) as client:
        address = f"https://127.0.0.1:{client.port}/v2"
        context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        with pytest.raises((urllib.error.URLError, OSError)):
            urllib.request.urlopen(address, context=context, timeout=5)
        context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
        assert urllib.request.urlopen(address, context=context, timeout=5).status == 200
        parts = [(certificates / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem")]
        for given, works in ((parts[:1], False), (parts, True)):
            credentials = grpc.ssl_channel_credentials(*given)
            with grpc.secure_channel(f"127.0.0.1:{client.rpc_port}", credentials) as channel:
                call = channel.unary_unary(f"/{SERVICE}/ServerLive", None, message("ServerLiveResponse").FromString)
                if works:
                    assert call(b"", timeout=5).live
                else:
                    with pytest.raises(grpc.RpcError):
                        call(b"", timeout=2)


def test_missing_certificates_are_said() -> None:
    with pytest.raises(ConfigError, match="PEM"):
        Tls(certificate=Path("/nowhere"), key=Path("/nowhere"))
