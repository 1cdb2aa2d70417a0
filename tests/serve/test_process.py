"""``espalier serve`` as a user starts and ends it."""

from __future__ import annotations

import http.client
import re
import signal
import subprocess
import sys
from pathlib import Path


def test_the_command_serves_and_ends_in_order(models: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "espalier", "serve", str(models["embedder"]), "--no-tune", "--threads", "1"]
    ports = ["--http", "0", "--grpc", "0"]
    with subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            found = re.search(r"embedder: http://127\.0\.0\.1:(\d+) and gRPC at 127\.0\.0\.1:\d+", said)
            assert found is not None, said
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
            connection.request("POST", "/v1/embeddings", '{"model": "embedder", "input": "a"}')
            assert connection.getresponse().status == 200
            connection.close()
            process.send_signal(signal.SIGTERM)
            _, complaints = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert complaints == "espalier: draining: not ready; what is under way is answered\n"
