"""Serve the files of a directory over HTTP and as S3 objects (moto), each behind a proxy that causes faults.

python tests/integration/faulty_server.py DIRECTORY

The first part of a path, or the bucket, names the fault; the files are the same for all. A repeated request succeeds, except
for permanent faults. The server prints the addresses of the two proxies as a line of JSON. A proxy answers a POST with the number
of faults so far, and forgets the requests it has seen.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

ONCE = ("reset", "error", "busy", "truncated", "short", "wrong", "slow", "hang")
ALWAYS = ("down", "deaf", "forbidden", "lying")
MIXED = "mixed"
"""Another fault of ONCE for each range of each file."""
BUCKETS = ("plain", MIXED, *ONCE, *ALWAYS)
# An index.json has no checksum, so these faults would change it unnoticed.
HARMLESS_TO_INDEX = {"short": "truncated", "wrong": "reset", "lying": "plain"}


class Files(BaseHTTPRequestHandler):
    """What http.server lacks: GET with a range. Also answers as Google's storage does: /.../b/BUCKET/o/NAME?alt=media."""

    protocol_version = "HTTP/1.1"
    root: ClassVar[Path]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        name = unquote(url.path.rpartition("/")[2])
        file = self.root / Path(name).name
        if not file.is_file() or ("alt" in parse_qs(url.query)) != ("/b/" in url.path):
            self.answer(404, b"no such file")
            return
        data = file.read_bytes()
        if limits := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(limits[1]), int(limits[2] or len(data) - 1)
            self.answer(206 if first < len(data) else 416, data[first : last + 1])
        else:
            self.answer(200, data)

    def answer(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


class Proxy(BaseHTTPRequestHandler):
    """Asks `upstream` and hands on the answer, or what becomes of it."""

    protocol_version = "HTTP/1.1"
    upstream: ClassVar[tuple[str, int]]
    seen: ClassVar[Counter[str]]
    faults: ClassVar[list[str]]
    lock: ClassVar[threading.Lock] = threading.Lock()

    def do_GET(self) -> None:
        upstream = http.client.HTTPConnection(*self.upstream)
        upstream.request("GET", self.path, headers={**self.headers, "Connection": "close"})
        response = upstream.getresponse()
        data = response.read()
        getattr(self, self.fault())(response, data)

    def do_POST(self) -> None:
        with self.lock:
            count = len(self.faults)
            self.faults.clear()
            self.seen.clear()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(count).encode())
        self.close_connection = True

    def fault(self) -> str:
        name = self.path.split("/")[1]
        request = f"{self.path} {self.headers.get('Range')}"
        if name == MIXED:
            name = ONCE[sum(request.encode()) % len(ONCE)]
        with self.lock:
            self.seen[request] += 1
            if name in ONCE and self.seen[request] > 1:
                return "plain"
            if "index.json" in self.path:
                name = HARMLESS_TO_INDEX.get(name, name)
            if name != "plain":
                self.faults.append(request)
        return name

    def plain(self, response: http.client.HTTPResponse, data: bytes) -> None:
        self.head(response, len(data))
        self.wfile.write(data)

    def head(self, response: http.client.HTTPResponse, length: int) -> None:
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def reset(self, response: http.client.HTTPResponse, data: bytes) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()  # with lingering off: a reset

    def error(self, response: http.client.HTTPResponse, data: bytes, status: int = 500) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def busy(self, response: http.client.HTTPResponse, data: bytes) -> None:
        self.error(response, data, 503)

    down = busy

    def forbidden(self, response: http.client.HTTPResponse, data: bytes) -> None:
        self.error(response, data, 403)

    def truncated(self, response: http.client.HTTPResponse, data: bytes) -> None:
        self.head(response, len(data))
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True

    def short(self, response: http.client.HTTPResponse, data: bytes) -> None:
        """Half of it, as if that were all."""
        self.plain(response, data[: len(data) // 2])

    def wrong(self, response: http.client.HTTPResponse, data: bytes) -> None:
        middle = len(data) // 2
        self.plain(response, data[:middle] + bytes(64) + data[middle + 64 :])

    lying = wrong

    def slow(self, response: http.client.HTTPResponse, data: bytes) -> None:
        """A byte now and then: every read makes progress."""
        self.head(response, len(data))
        for number in range(200):
            self.wfile.write(data[number : number + 1])
            time.sleep(0.1)

    def hang(self, response: http.client.HTTPResponse, data: bytes) -> None:
        time.sleep(20)
        self.close_connection = True

    deaf = hang

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients leave; that is what they are tested for."""


def serve(handler: type[BaseHTTPRequestHandler]) -> tuple[str, int]:
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return "127.0.0.1", server.server_port


def proxied(upstream: tuple[str, int]) -> str:
    host, port = serve(type("ItsProxy", (Proxy,), {"upstream": upstream, "seen": Counter(), "faults": []}))
    return f"http://{host}:{port}"


def s3(root: Path) -> tuple[str, int]:
    """A moto server with the files in each bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    for bucket in BUCKETS:
        client.create_bucket(Bucket=bucket)
        for file in root.iterdir():
            client.put_object(Bucket=bucket, Key=f"set/{file.name}", Body=file.read_bytes())
    return host, port


def main(root: Path) -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    Files.root = root
    print(json.dumps({"http": proxied(serve(Files)), "s3": proxied(s3(root))}), flush=True)
    sys.stdin.read()  # until the parent process ends


if __name__ == "__main__":
    main(Path(sys.argv[1]))
