import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from longnet_dist.cli.serve import main
from longnet_dist.errors import ConfigError, MissingExtraError
from tests.train.runs import run, tiny_config, write_corpus

ROOT = Path(__file__).parents[2]
pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    run(1, tiny_config(folder / "run", write_corpus(folder / "source.tokens")))
    return str(folder / "run")


def test_a_run_is_served_until_an_interrupt(folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "longnet_dist", "serve", folder, "--port", str(port), "--max-tokens", "500"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout.readline() == f"serving http://127.0.0.1:{port}/v1/completions\n"
        body = json.dumps({"prompt": "import", "max_tokens": 9, "echo": True}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.loads(answer.read())
        assert found["model"] == "run"
        assert found["choices"][0]["text"].startswith("import")
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    assert "Traceback" not in errors


def test_a_port_that_is_taken_is_named(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}.*use another"):
            main([folder, "--port", str(port)])


def test_without_the_extra_its_install_is_named(folder, monkeypatch):
    monkeypatch.setattr("longnet_dist.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'longnet-dist\[serve\]'"):
        main([folder])
