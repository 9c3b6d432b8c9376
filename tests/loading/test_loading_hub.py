"""The whole way to the hub and back, against a small server of its protocol on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from loading_checkpoints import CONFIG, llama_weights, write_sharded

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


class _Hub(http.server.BaseHTTPRequestHandler):
    """One repository, org/tiny, at one commit."""

    files: dict[str, bytes]
    served: list[str]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main"):
            listing = [{"rfilename": name} for name in self.files]
            self._send(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": listing}).encode(), body=body)
        elif path.startswith("/api/models/org/tiny/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            self._send(json.dumps(entries).encode(), body=body)
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/") and path.rsplit("/", 1)[1] in self.files:
            name = path.rsplit("/", 1)[1]
            if body:
                self.served.append(name)
            self._send(self.files[name], body=body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, content: bytes, *, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Not into the test's output."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[_Hub]]]:
    """The address of a running server, and its handler."""
    directory = write_sharded(tmp_path / "published", CONFIG, llama_weights())
    (directory / "pytorch_model.bin").write_bytes(b"never fetched")
    handler = type("Hub", (_Hub,), {"files": {p.name: p.read_bytes() for p in directory.iterdir()}, "served": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def _open(name: str, cache: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Another process, since huggingface_hub reads its variables when it is imported."""
    program = (
        "import sys\n"
        "from quikjax.errors import QuikError\n"
        "from quikjax.loading import open_source\n"
        "try:\n"
        "    source = open_source(sys.argv[1])\n"
        "    from quikjax.checkpoint.load import load\n"
        "    load(sys.argv[1])\n"
        "    print(source.revision, source.fingerprint())\n"
        "except QuikError as problem:\n"
        "    print('refused:', problem)\n"
    )
    # No token, no proxy and no offline switch of the person who runs the tests.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    return subprocess.run(
        [sys.executable, "-c", program, name],
        capture_output=True,
        text=True,
        check=True,
        env=inherited | {"HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
    )


def test_fetched_once_then_found_offline(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    address, handler = hub
    online = _open("org/tiny", tmp_path / "cache", HF_ENDPOINT=address)
    assert online.stdout.startswith(f"org/tiny@{COMMIT} ")
    assert "Fetching" in online.stderr  # progress does not mix with results
    assert sorted(handler.served) == sorted(name for name in handler.files if not name.endswith(".bin"))
    offline = _open("org/tiny", tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout


def test_a_name_that_the_hub_does_not_have(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    done = _open("org/other", tmp_path / "cache", HF_ENDPOINT=hub[0])
    assert done.stdout.startswith('refused: neither this machine nor the hub has "org/other"')
    assert done.stdout.count("\n") == 1


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    done = _open("org/tiny", tmp_path / "cache", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.stdout.startswith('refused: "org/tiny" is not here, the hub cannot be reached, and its cache')
    assert done.stdout.count("\n") == 1
