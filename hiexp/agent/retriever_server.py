"""A retriever server over one search tool, for agents and trainers that run elsewhere.

Routes: ``POST /retrieve`` (search_r1's schema), ``POST /queries`` (r1_searcher's), ``GET /health`` (tool, passages,
queries answered). Bad requests get status 400 and ``{"error": …}``, too many waiting ones 503 with ``Retry-After``.
Requests that come while a search runs are searched together. Schemas: see http_tool.py.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from hiexp.agent.query_batcher import BusyError, QueryBatcher
from hiexp.agent.tools import Document

Json = dict[str, Any]
_MAX_BODY_BYTES = 16 << 20
_MAX_QUERIES, _MAX_TOP_K = 4096, 1000
_DEFAULT_TOP_K = 3  # of both stacks
_IDLE_S = 60.0  # a client that stops in the middle of a request keeps its thread no longer
_MAX_WAITING = 16384  # queries
_MAX_CONNECTIONS = 1024
_DRAIN_S = 30.0  # for requests under way when the server is told to stop


class ScoredTool(Protocol):
    """A search tool that also gives its scores, larger is better."""

    name: str

    @property
    def documents(self) -> Any: ...

    def search_scored(self, queries: list[str], top_k: int) -> list[list[tuple[Document, float]]]: ...


class BadRequestError(ValueError):
    """The request's fault; the text goes to the client."""


class RetrieverServer(ThreadingHTTPServer):
    """Serve ``tool`` on ``host``:``port`` (0 takes a free one; ``server_port`` tells which).

    Every connection has a thread, at most 1024 of them; one more thread searches, for all of them together.
    """

    daemon_threads = True
    request_queue_size = 256  # connections that may wait to be accepted; the default 5 loses bursts

    def __init__(self, tool: ScoredTool, host: str = "127.0.0.1", port: int = 8000) -> None:
        self.tool = tool
        self.searches = QueryBatcher(tool, _MAX_WAITING)
        self.stopping = False
        self._connections = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._under_way = 0
        self._changed = threading.Condition()
        super().__init__((host, port), _Handler)

    def search(self, queries: list[str], top_k: int) -> list[list[tuple[Document, float]]]:
        """One request's queries, in a batch with those of other requests."""
        return self.searches.search(queries, top_k) if queries else []

    def health(self) -> Json:
        """What is served, how much was asked so far, and what waits."""
        return {
            "tool": self.tool.name,
            "passages": len(self.tool.documents),
            "queries": self.searches.queries,
            "searches": self.searches.searches,
            "waiting": self.searches.waiting,
            "refused": self.searches.refused,
            "cache_hits": getattr(self.tool, "hits", 0),
        }

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection; without a free place it is closed, and its client may come back."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that went away is no news."""

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Around one request, so that :meth:`drain` can wait for it."""
        with self._changed:
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def drain(self, timeout_s: float = _DRAIN_S) -> bool:
        """Wait for the requests under way after :meth:`shutdown`; whether all of them were answered."""
        self.stopping = True
        with self._changed:
            return self._changed.wait_for(lambda: self._under_way == 0, timeout_s)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_S
    server: RetrieverServer

    def do_GET(self) -> None:
        if self.path.rstrip("/") == "/health":
            self._reply(200, self.server.health())
        else:
            self._reply(404, {"error": f"no such route: GET {self.path}; POST /retrieve, POST /queries, GET /health"})

    def do_POST(self) -> None:
        answer = _ROUTES.get(self.path.rstrip("/"))
        if answer is None:
            self.close_connection = True  # the body was not read
            self._reply(404, {"error": f"no such route: POST {self.path}; POST /retrieve, POST /queries, GET /health"})
            return
        with self.server.answering():
            self._answer(answer)

    def _answer(self, answer: Callable[[RetrieverServer, Json], Json]) -> None:
        try:
            self._reply(200, answer(self.server, self._body()))
        except BadRequestError as error:
            self._reply(400, {"error": str(error)})
        except BusyError as error:
            self._reply(503, {"error": str(error)}, {"Retry-After": "1"})
        except OSError:  # the connection broke: there is nobody to tell
            self.close_connection = True
        except Exception as error:  # the server goes on whatever one request does
            self._reply(500, {"error": f"{type(error).__name__}: {error}"})

    def _body(self) -> Json:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _MAX_BODY_BYTES:
            self.close_connection = True
            raise BadRequestError(f"Content-Length: expected 0..{_MAX_BODY_BYTES}, got {length!r}")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise BadRequestError(f"body: expected a JSON object, got something else ({error})") from error
        if not isinstance(body, dict):
            raise BadRequestError(f"body: expected a JSON object, got {type(body).__name__}")
        return body

    def _reply(self, status: int, body: Json, headers: Json | None = None) -> None:
        data = json.dumps(body).encode("utf-8")
        self.close_connection |= self.server.stopping
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a training run asks thousands of times a minute."""


def serve(tool: Any, host: str, port: int) -> int:
    """Serve until Ctrl-C or SIGTERM; says where, and at the end how much was asked."""
    server = RetrieverServer(tool, host, port)
    # shutdown() waits for the loop, which runs in this thread: so from another one.
    stop = threading.Thread(target=server.shutdown, daemon=True)
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.start())
    address = f"http://{host}:{server.server_port}"
    print(
        f"{server.health()['passages']:,} passages ({tool.name}) at {address}/retrieve and {address}/queries",
        flush=True,
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)
        answered = server.drain()
        server.server_close()
        server.searches.close()
    hits = f", {server.tool.hits:,} of them from the cache" if hasattr(server.tool, "hits") else ""
    print(f"stopped after {server.searches.queries:,} queries{hits}" + ("" if answered else "; some were cut off"))
    return 0


def _retrieve(server: RetrieverServer, body: Json) -> Json:
    queries, top_k = _queries(body), _top_k(body, "topk")
    scored = body.get("return_scores", False)
    if not isinstance(scored, bool):
        raise BadRequestError(f"return_scores: expected true or false, got {scored!r}")
    rows = [
        [
            {"document": _document(document), "score": score} if scored else _document(document)
            for document, score in one
        ]
        for one in server.search(queries, top_k)
    ]
    return {"result": rows}


def _answers(server: RetrieverServer, body: Json) -> Json:
    queries, top_k = _queries(body), _top_k(body, "k")
    found = server.search(queries, top_k)
    return {"queries": queries, "answers": [[_document(document)["contents"] for document, _ in one] for one in found]}


_ROUTES: dict[str, Callable[[RetrieverServer, Json], Json]] = {"/retrieve": _retrieve, "/queries": _answers}


def _document(document: Document) -> Json:
    return {"id": document.id, "contents": f"{document.title}\n{document.text}"}


def _queries(body: Json) -> list[str]:
    queries = body.get("queries")
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise BadRequestError(f"queries: expected a list of strings, got {queries!r:.120}")
    if len(queries) > _MAX_QUERIES:
        raise BadRequestError(f"queries: expected at most {_MAX_QUERIES}, got {len(queries)}")
    return queries


def _top_k(body: Json, key: str) -> int:
    value = body.get(key)
    if value is None:
        return _DEFAULT_TOP_K
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_TOP_K:
        raise BadRequestError(f"{key}: expected an integer in 1..{_MAX_TOP_K}, got {value!r}")
    return value
