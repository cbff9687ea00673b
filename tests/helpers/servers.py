"""Servers on loopback: the APIs of S3 and of Google's storage, and a file server that fails at random."""

import contextlib
import random
import socket
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Flaky(BaseHTTPRequestHandler):
    """Serves the files of a folder, and fails a fraction of the requests in each of the ways `kinds` in turn. /moved/X
    is redirected to /X."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder, failing, ranges, seconds, kinds, log, *rest):
        self.folder, self.failing, self.ranges, self.seconds = folder, failing, ranges, seconds
        self.kinds, self.log = kinds, log
        super().__init__(*rest)

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        faults = sum(fault is not None for *_, fault in self.log)
        fails = int((len(self.log) + 1) * self.failing) > int(len(self.log) * self.failing)  # as often as that, evenly
        fault = self.kinds[faults % len(self.kinds)] if fails else None
        name = unquote(self.path.partition("?")[0]).lstrip("/")
        if name.startswith("moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/moved/", "/", 1))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        path = self.folder / name
        self.log.append((self.command, self.path, fault))
        if fault == "hang":
            time.sleep(self.seconds)
        if fault == "503" or not path.exists():
            return self.send_error(503 if fault else 404)
        data = path.read_bytes()
        start, stop = 0, len(data)
        wanted = self.headers.get("Range") if self.ranges else None
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1 if last else stop)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{hash(data)}"')
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}") if wanted else None
        self.end_headers()
        if body:
            part = data[start:stop]
            self.wfile.write(part[: random.randrange(len(part) + 1)] if fault == "death" else part)
        self.close_connection = fault == "death" or self.close_connection

    def log_message(self, *words):
        pass


@contextlib.contextmanager
def flaky(folder, failing=0.0, ranges=True, seconds=30.0, kinds=("503", "death", "hang")):
    """(address, log): a server that fails `failing` of the requests; log: (method, path, fault or None). A hang takes
    `seconds`."""
    log = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Flaky, Path(folder), failing, ranges, seconds, kinds, log))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def s3(monkeypatch):
    """A bucket `shards` of moto's server, as the environment's S3; gives put(path, name) and delete(name)."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    try:
        yield (
            lambda path, name: client.upload_file(str(path), "shards", name),
            lambda name: client.delete_object(Bucket="shards", Key=name),
        )
    finally:
        server.stop()


@contextlib.contextmanager
def gs(monkeypatch):
    """A bucket `shards` of an emulator, as the environment's Google storage; gives put(path, name) and delete(name)."""
    from gcp_storage_emulator.server import create_server
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="shards")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # credentials are not looked for on the network
    bucket = Client(project="any", credentials=AnonymousCredentials()).bucket("shards")
    try:
        yield (
            lambda path, name: bucket.blob(name).upload_from_filename(str(path)),
            lambda name: bucket.blob(name).delete(),
        )
    finally:
        server.stop()
