"""Shared by all tests: fixed seeds, the real data folder, the one tolerance table, a loopback HTTP server, no GPU tests
without a GPU.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import threading
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

# dtype -> (relative, absolute). What one rounding of the dtype allows times a margin for the longest sums in the tests;
# references are float64.
TOLERANCES = {
    "float64": (1e-9, 1e-11),
    "float32": (2e-5, 2e-6),
    "float16": (4e-3, 4e-3),
    "bfloat16": (3e-2, 3e-2),
}


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that draw from the global generator
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def data_dir():
    """The real data folder; tests that need it are skipped where it is not."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("HIEXP_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set HIEXP_DATA")
    return path


def _as_numpy(value):
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


@pytest.fixture(scope="session")
def assert_close():
    """``assert_close(actual, expected, dtype, budget=0)``: within the tolerance of dtype in the table, plus budget.

    ``budget``: the error of the same computation in plain torch or numpy of that dtype; a kernel may not be worse.
    """

    def check(actual, expected, dtype, budget=0.0):
        relative, absolute = TOLERANCES[str(dtype).removeprefix("torch.")]
        np.testing.assert_allclose(_as_numpy(actual), _as_numpy(expected), rtol=relative, atol=absolute + budget)

    return check


class Request(NamedTuple):
    """What a client sent; header names in small letters."""

    method: str
    path: str
    headers: dict
    body: bytes
    connection: socket.socket

    def json(self):
        return json.loads(self.body)


class HttpServer:
    """Gives its replies in turn, the last for ever; counts connections and keeps requests.

    A reply is (status, body) or (status, body, headers), where a body is bytes or becomes JSON; or raw bytes; or a
    function of the request that returns one of these, or None where it has used ``request.connection`` itself, which is
    then closed. ``release`` is set when the test ends, for functions that hang.
    """

    def __init__(self, *replies):
        self.replies, self.requests, self.connections = replies, [], 0
        self.release = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        try:
            with connection, connection.makefile("rb") as stream:
                while (request := self._read(stream, connection)) is not None:
                    with self._lock:
                        reply = self.replies[min(len(self.requests), len(self.replies) - 1)]
                        self.requests.append(request)
                    if callable(reply) and (reply := reply(request)) is None:
                        return
                    data = reply if isinstance(reply, bytes) else http_answer(*reply)
                    connection.sendall(data)
                    if b"\r\nConnection: close\r\n" in data:
                        return
        except OSError:  # the client has left
            return

    @staticmethod
    def _read(stream, connection):
        line = stream.readline().decode()
        if not line:
            return None
        headers = {}
        while (row := stream.readline().strip()) != b"":
            name, _, value = row.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        method, path, _ = line.split()
        return Request(method, path, headers, stream.read(int(headers.get("content-length", 0))), connection)

    def close(self):
        self.release.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts; the port is free at once
        self._listener.close()


def http_answer(status, body, headers=()):
    """The bytes of one answer; a ``Content-Length`` in ``headers`` replaces the true one."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    rows = {"Content-Length": str(len(data)), **dict(headers)}
    head = "".join(f"{name}: {value}\r\n" for name, value in rows.items())
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{head}\r\n".encode() + data


@pytest.fixture
def http_server(monkeypatch):
    """``http_server(*replies)`` starts an :class:`HttpServer`; clients do not wait, their pauses are in ``pauses``."""
    pauses, servers = [], []
    monkeypatch.setattr("hiexp.agent.http_rules.time.sleep", pauses.append)

    def start(*replies):
        server = HttpServer(*replies)
        server.pauses = pauses
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
