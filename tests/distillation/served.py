"""S3 for tests: moto's server, and in front of it a proxy that counts, waits, refuses and hangs."""

from __future__ import annotations

import contextlib
import http.client
import socketserver
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

from moto.server import ThreadedMotoServer


@contextlib.contextmanager
def s3_server(bucket: str = "bucket") -> Iterator[str]:
    """host:port of a server with one bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", f"/{bucket}")
    connection.getresponse().read()
    connection.close()
    yield f"{host}:{port}"
    server.stop()


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if "chunked" not in request.headers.get("Transfer-Encoding", ""):
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    pieces = []
    while size := int(request.rfile.readline().split(b";")[0], 16):
        pieces.append(request.rfile.read(size))
        request.rfile.readline()
    while request.rfile.readline().strip():
        pass
    return b"".join(pieces)


class Proxy:
    """Passes requests on to `server` and keeps them in `log`: method, path, status, bytes of the answer's body."""

    def __init__(self, server: str) -> None:
        self.server, self.log = server, []
        self.delay = 0.0
        """Seconds before each answer."""
        self.status: int | None = None
        """Answer every request with this instead."""
        self.failures = 0
        """Answer so many requests with 503 first."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                proxy.answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
            daemon_threads, allow_reuse_address, request_queue_size = True, True, 64

            def handle_error(self, *_: object) -> None:
                pass

        self._http = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.address = f"127.0.0.1:{self._http.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = _body(request)
        time.sleep(self.delay)
        status, headers, content = self._ask(request, body)
        self.log.append((request.command, request.path, status, len(content)))
        request.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                request.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), "0")
        request.send_header("Content-Length", length if request.command == "HEAD" else str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _ask(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        if self.status is not None:
            return self.status, [], b""
        if self.failures:
            self.failures -= 1
            return 503, [], b""
        connection = http.client.HTTPConnection(self.server)
        headers = {
            k: v for k, v in request.headers.items() if k.lower() not in ("connection", "transfer-encoding", "content-length", "expect")
        }
        connection.request(request.command, request.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), content

    def fetched(self) -> int:
        """Bytes of all objects that were read."""
        return sum(size for method, path, status, size in self.log if method == "GET" and status in (200, 206) and "list-type" not in path)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextlib.contextmanager
def proxied(server: str) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.close()
