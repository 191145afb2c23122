"""A real HTTP server on loopback that serves a folder of shards and misbehaves on request."""

import contextlib
import gzip
import http.server
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

Trick = Callable[[http.server.BaseHTTPRequestHandler, bytes], None]
"""Answers one request in place of the server; gets the file's content."""


class ShardServer:
    """Serves the files of a folder.

    Attributes:
        url: Of the folder.
        asked: How often each path was asked for.
        sent: How often each file was sent whole.
        headers: The headers of the last request for each path.
        tricks: For each path the answers to its next requests, the first one first; None is a good answer.
        head: The status of every answer to HEAD, which only a client of S3 sends.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        """Starts to serve, on a port that nobody uses unless one is given."""
        self.asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.headers: dict[str, dict[str, str]] = {}
        self.tricks: dict[str, list[Trick | None]] = {}
        self.head = 403
        self._lock = threading.Lock()
        served = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served.answer(self, folder)

            def do_HEAD(self) -> None:
                path = folder / unquote(self.path).lstrip("/")
                self.send_response(served.head)
                self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                """Says nothing."""

        class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: object, client_address: object) -> None:
                """Says nothing of clients that left."""

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler, folder: Path) -> None:
        """Answers one request."""
        name = unquote(request.path).lstrip("/")
        with self._lock:
            self.asked[name] += 1
            self.headers[name] = dict(request.headers)
            tricks = self.tricks.get(name)
            trick = tricks.pop(0) if tricks else None
        path = folder / name
        if not path.is_file():
            request.send_error(404)
            return
        if trick is None:
            with self._lock:
                self.sent[name] += 1  # before the client can have it all, and look here
        (trick or send)(request, path.read_bytes())

    def close(self) -> None:
        """Stops to listen."""
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[ShardServer]:
    """Serves a folder for a while."""
    server = ShardServer(folder, port)
    try:
        yield server
    finally:
        server.close()


def send(request: http.server.BaseHTTPRequestHandler, content: bytes, length: int | None = None) -> None:
    """Sends content, with a length that may be a lie."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(content) if length is None else length))
    request.end_headers()
    request.wfile.write(content)


def status(code: int) -> Trick:
    """An error without content."""
    return lambda request, content: request.send_error(code)


def stall(seconds: float) -> Trick:
    """Half of the file, then nothing."""

    def trick(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        send(request, content[: len(content) // 2], len(content))
        request.wfile.flush()
        time.sleep(seconds)

    return trick


def creep(seconds: float) -> Trick:
    """One byte now and then."""

    def trick(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        send(request, b"", len(content))
        for number in range(int(seconds / 0.02)):
            request.wfile.write(content[number : number + 1])
            request.wfile.flush()
            time.sleep(0.02)

    return trick


def truncate(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """Half of the file, then the end of the connection."""
    send(request, content[: len(content) // 2], len(content))


def truncate_without_length(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """Half of the file, of which nobody said how long it is."""
    request.send_response(200)
    request.end_headers()
    request.wfile.write(content[: len(content) // 2])


def chunked(request: http.server.BaseHTTPRequestHandler, content: bytes, end: bytes = b"0\r\n\r\n") -> None:
    """All of the file, in chunks, as HTTP/1.1 sends what it has no length of."""
    request.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for start in range(0, len(content), 1000):
        chunk = content[start : start + 1000]
        request.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    request.wfile.write(end)


def truncate_chunks(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """Half of the file in chunks, and then the end of the connection within another one."""
    chunked(request, content[: len(content) // 2], b"3e8\r\nhalf of it")


def hang_up(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """No answer at all."""


def redirect(location: str) -> Trick:
    """Sends the client elsewhere."""

    def trick(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        request.send_response(302)
        request.send_header("Location", location)
        request.end_headers()

    return trick


def compress(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """The file compressed, though nobody asked for it."""
    packed = gzip.compress(content)
    request.send_response(200)
    request.send_header("Content-Encoding", "gzip")
    request.send_header("Content-Length", str(len(packed)))
    request.end_headers()
    request.wfile.write(packed)


def reset(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """Half of the file, then a reset."""
    send(request, content[: len(content) // 2], len(content))
    request.wfile.flush()
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()


def understate(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """All of the file, after a length that is half of it."""
    send(request, content, len(content) // 2)


def overstate(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """All of the file, after a length that is more."""
    send(request, content, len(content) + 1000)


def lengthen(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """More than the file, without a length."""
    request.send_response(200)
    request.end_headers()
    request.wfile.write(content + bytes(5000))


def not_http(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """No HTTP at all."""
    request.wfile.write(b"what?\r\n\r\n")


def other(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """Another file of the same length."""
    send(request, content[:-600] + bytes(byte ^ 1 for byte in content[-600:]))


def page(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """What a login page would send."""
    send(request, b"<html>Please log in</html>")
