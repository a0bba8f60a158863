"""A small HTTP proxy that does to chosen requests what networks and servers do now and then.

It stands between the client and a real server, counts and keeps the requests, and follows a script:
a function that is given each request and may return a ``Fault``.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Generator, Iterable
from email.message import Message
from typing import TypeAlias
from urllib.parse import parse_qs, urlsplit

import attrs

__all__ = [
    "LOST_AFTER",
    "LOST_BEFORE",
    "Answer",
    "Fault",
    "Proxy",
    "Request",
    "Script",
    "answered",
    "cut",
    "edited",
    "edited_header",
    "flipped",
    "no_fault",
    "nth",
    "silent",
    "trickling",
    "whole",
]


@attrs.define(kw_only=True)
class Request:
    """A request as it came."""

    #: From 1 on, since the script began.
    number: int
    method: str
    target: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes = attrs.field(repr=False)
    #: What the real server answered; None until then, and where it was not asked.
    status: int | None = None

    @property
    def path(self) -> str:
        """Without the query; percent-encoded."""
        return self.target.partition("?")[0]

    @property
    def verb(self) -> str:
        """What S3 calls it, as far as tests care."""
        if "uploads" in self.query:
            return "CreateUpload" if self.method == "POST" else "ListUploads"
        if "uploadId" in self.query:
            return {
                "POST": "CompleteUpload",
                "DELETE": "AbortUpload",
                "PUT": "CopyPart" if "x-amz-copy-source" in self.headers else "UploadPart",
            }[self.method]
        return "List" if "list-type" in self.query else self.method


@attrs.define(kw_only=True)
class Answer:
    """What goes back to the client."""

    status: int
    headers: list[tuple[str, str]] = attrs.field(factory=list[tuple[str, str]])
    body: bytes = attrs.field(default=b"", repr=False)


@attrs.frozen(kw_only=True)
class Fault:
    """What becomes of one request. In the order of the fields."""

    #: Seconds of silence; nothing has happened yet.
    delay: float = 0
    #: The connection is closed, and the server never hears of it.
    lost_before: bool = False
    #: The server is not asked, and this is the answer.
    instead: Answer | None = None
    #: The server did it, and the connection is closed without an answer.
    lost_after: bool = False
    #: Changes the answer on its way.
    edit: Callable[[Answer], Answer] | None = None
    #: Bytes of the body that are sent; then the connection is closed.
    cut: int | None = None
    #: Say no length in advance: the body comes in chunks.
    chunked: bool = False
    #: Bytes of the body a second.
    rate: int | None = None


Script: TypeAlias = Callable[[Request], Fault | None]

LOST_BEFORE = Fault(lost_before=True)
LOST_AFTER = Fault(lost_after=True)


def nth(number: int, fault: Fault) -> Script:
    """One request, and no other."""
    return lambda request: fault if request.number == number else None


def answered(
    status: int,
    code: str | None = None,
    *,
    headers: Iterable[tuple[str, str]] = (),
    body: bytes | None = None,
) -> Fault:
    """The server is not asked; ``code`` goes into the answer as S3 does it."""
    if body is None:
        body = b"" if code is None else f"<Error><Code>{code}</Code></Error>".encode()
    return Fault(instead=Answer(status=status, headers=list(headers), body=body))


def silent(seconds: float) -> Fault:
    """The first byte of the answer is late."""
    return Fault(delay=seconds)


def cut(at: int, *, chunked: bool = False) -> Fault:
    """The answer's body ends early."""
    return Fault(cut=at, chunked=chunked)


def trickling(rate: int) -> Fault:
    """``rate`` bytes a second."""
    return Fault(rate=rate)


def edited(edit: Callable[[Answer], Answer]) -> Fault:
    """The server's answer, changed."""
    return Fault(edit=edit)


def flipped(at: int) -> Fault:
    """One bit of the body is another one."""

    def edit(answer: Answer) -> Answer:
        body = bytearray(answer.body)
        body[at] ^= 1
        return attrs.evolve(answer, body=bytes(body))

    return edited(edit)


def edited_header(name: str, change: Callable[[str], str | None]) -> Fault:
    """A header of the answer has another value, or (None) is not there."""

    def edit(answer: Answer) -> Answer:
        headers: list[tuple[str, str]] = []
        for one, value in answer.headers:
            new = change(value) if one.lower() == name.lower() else value
            if new is not None:
                headers.append((one, new))
        return attrs.evolve(answer, headers=headers)

    return edited(edit)


def whole(body: bytes) -> Fault:
    """200 and the whole object, whatever range was asked for."""

    def edit(answer: Answer) -> Answer:
        headers = [one for one in answer.headers if one[0].lower() != "content-range"]
        return Answer(status=200, headers=headers, body=body)

    return edited(edit)


def no_fault(_request: Request) -> None:
    """The script that lets everything through."""


class Proxy:
    """The running proxy; ``endpoint`` is where clients go."""

    def __init__(self, upstream: str, *, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.script: Script = no_fault
        #: Since the script began.
        self.requests: list[Request] = []
        #: How many connections of clients are open; there are no more where a process was killed.
        self.connections = 0
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.proxy = self
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        host, port = self._server.server_address[:2]
        self.endpoint = f"{'http' if tls is None else 'https'}://{host!s}:{port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()

    @contextlib.contextmanager
    def scripted(self, script: Script) -> Generator[list[Request]]:
        """Follow a script; gives the requests since then."""
        with self.lock:
            self.requests = []
            self.script = script
        try:
            yield self.requests
        finally:
            with self.lock:
                self.script = no_fault

    def count(self, *verbs: str) -> int:
        """How many requests there were (of these verbs)."""
        return sum(not verbs or request.verb in verbs for request in self.requests)

    def close(self) -> None:
        """Stop; whoever still waits for an answer loses the connection."""
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: Proxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections break here all the time; that is what it is for."""


class _Handler(socketserver.StreamRequestHandler):
    """One connection of a client, with one to the server."""

    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self) -> None:
        super().setup()
        assert isinstance(self.server, _Server)
        self.proxy = self.server.proxy
        self.upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        with self.proxy.lock:
            self.proxy.connections += 1

    def finish(self) -> None:
        self.upstream.close()
        with contextlib.suppress(OSError):
            super().finish()
        with self.proxy.lock:
            self.proxy.connections -= 1

    def handle(self) -> None:
        proxy = self.proxy
        while (request := self._read()) is not None:
            with proxy.lock:
                request.number = len(proxy.requests) + 1
                proxy.requests.append(request)
                fault = proxy.script(request) or Fault()
            if fault.delay and proxy.stopping.wait(fault.delay):
                return
            if fault.lost_before:
                return
            answer = fault.instead
            if answer is None:
                answer = self._ask(request)
            if fault.lost_after:
                return
            if fault.edit is not None:
                answer = fault.edit(answer)
            if not self._send(request, answer, fault):
                return

    def _read(self) -> Request | None:
        line = self.rfile.readline(65537)
        if not line.strip():
            return None
        method, target, _ = line.decode("latin-1").split()
        headers = http.client.parse_headers(self.rfile)
        if headers.get("Expect", "").lower() == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.wfile.flush()
            del headers["Expect"]
        length = int(headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            return None  # the client has gone: a server would wait for the rest
        url = urlsplit(target)
        return Request(
            number=0,
            method=method,
            target=target,
            query=parse_qs(url.query, keep_blank_values=True),
            headers=headers,
            body=body,
        )

    def _ask(self, request: Request) -> Answer:
        asking = self.upstream
        asking.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            asking.putheader(name, value)
        asking.endheaders(request.body or None)
        response = asking.getresponse()
        body = response.read()
        request.status = response.status
        hop = {"connection", "transfer-encoding", "keep-alive"}
        headers = [
            (name, value) for name, value in response.getheaders() if name.lower() not in hop
        ]
        return Answer(status=response.status, headers=headers, body=body)

    def _send(self, request: Request, answer: Answer, fault: Fault) -> bool:
        """Whether the connection can be used again."""
        bare = request.method == "HEAD" or answer.status in {204, 304}
        lines = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, '')}"]
        lines += [
            f"{name}: {value}"
            for name, value in answer.headers
            if bare or name.lower() != "content-length"
        ]
        if fault.chunked:
            lines.append("Transfer-Encoding: chunked")
        elif not bare or not any(name.lower() == "content-length" for name, _ in answer.headers):
            lines.append(f"Content-Length: {len(answer.body)}")
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        if bare:
            self.wfile.flush()
            return True
        body = answer.body[: fault.cut]
        step = len(body) or 1 if fault.rate is None else max(fault.rate // 10, 1)
        for at in range(0, len(body), step):
            piece = body[at : at + step]
            if fault.chunked:
                piece = b"%x\r\n%b\r\n" % (len(piece), piece)
            self.wfile.write(piece)
            self.wfile.flush()
            if fault.rate is not None and self.proxy.stopping.wait(0.1):
                return False
        self.wfile.flush()
        if fault.cut is not None:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
            return False
        if fault.chunked:
            self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()
        return True
