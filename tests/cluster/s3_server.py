"""A real S3 server on loopback, OpenStack Swift with its S3 API, and a proxy that makes faults."""

import contextlib
import http.client
import http.server
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "test:tester", "testing"
LISTING = 100
"""Keys in an answer to a listing at most; 1,000 at Amazon."""

_COMMON = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
log_level = WARNING
"""
_STORAGE = """devices = {folder}/srv
mount_check = false
recon_cache_path = {folder}/cache
fallocate_reserve = 0
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
_FILTERS = ("catch_errors", "gatekeeper", "healthcheck", "listing_formats", "bulk")
_PROXY = f"""[pipeline:main]
pipeline = {" ".join(_FILTERS)} cache s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
s3_acl = false
max_bucket_listing = {LISTING}
check_bucket_owner = false
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def swift(folder):
    """Run the server on data in a folder; yields its address."""
    bin_folder = Path(sys.executable).parent
    ports = {kind: free_port() for kind in ("object", "container", "account", "proxy")}
    for name in ("srv/d1", "cache"):
        (folder / name).mkdir(parents=True)
    (folder / "swift.conf").write_text(
        "[swift-hash]\nswift_hash_path_suffix = test\n"
        "[storage-policy:0]\nname = default\ndefault = yes\n"
    )
    plain = "".join(f"[filter:{n}]\nuse = egg:swift#{n}\n" for n in (*_FILTERS, "slo", "dlo"))
    for kind, port in ports.items():
        fields = {"port": port, "user": "root", "folder": folder, "kind": kind}
        body = _PROXY + plain if kind == "proxy" else _STORAGE
        (folder / f"{kind}.conf").write_text((_COMMON + body).format(**fields))
        if kind != "proxy":
            for step in (
                ["create", "4", "1", "1"], ["add", f"r1z1-127.0.0.1:{port}/d1", "1"], ["rebalance"],
            ):  # fmt: skip
                command = [bin_folder / "swift-ring-builder", f"{kind}.builder", *step]
                subprocess.run(
                    list(map(str, command)), cwd=folder, check=True, stdout=subprocess.DEVNULL
                )
    servers = []
    try:
        for kind in ports:
            command = [bin_folder / f"swift-{kind}-server", folder / f"{kind}.conf"]
            with (folder / f"{kind}.log").open("wb") as log:
                servers.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command)], stdout=log, stderr=log
                    )
                )  # fmt: skip
        _await_health(ports["proxy"], servers, folder)
        yield f"http://127.0.0.1:{ports['proxy']}"
    finally:
        for server in servers:
            server.send_signal(signal.SIGTERM)
        for server in servers:
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _await_health(port, servers, folder):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for server in servers:
            logs = [path.read_text()[-2000:] for path in folder.glob("*.log")]
            assert server.poll() is None, logs
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/healthcheck")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise TimeoutError("the S3 server does not answer")


def environment(address):
    """What a process needs to use the server, credentials included."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


_SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
_DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>"


class _Proxy(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.choose(self.path)
        if fault == "denied":
            return self.answer(403, {}, _DENIED)
        if fault == "slow_down":
            return self.answer(503, {}, _SLOW_DOWN)
        if fault == "latency":
            time.sleep(0.5)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        headers = {
            k: v
            for k, v in response.getheaders()
            if k.lower() not in ("transfer-encoding", "connection", "date", "server")
        }
        content = response.read()
        connection.close()
        cut = len(content) // 2 if fault in ("reset", "truncate") else None
        return self.answer(response.status, headers, content, cut, reset=fault == "reset")

    def answer(self, status, headers, content, cut=None, reset=False):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        length = headers.get("Content-Length", len(content))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            if reset:  # closing with a pending linger of zero sends RST
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any


class FaultyProxy(http.server.ThreadingHTTPServer):
    """Passes requests on, and makes a seeded share of them fail.

    faults: how many of each kind were made. Requests for keys that contain `forbidden` are denied.
    """

    kinds = ("slow_down", "reset", "truncate", "latency")

    def __init__(self, address, rate, seed):
        super().__init__(("127.0.0.1", 0), _Proxy)
        self.behind = int(address.rsplit(":", 1)[1])
        self.rate, self.chance = rate, random.Random(seed)
        self.requests = 0
        self.faults = dict.fromkeys((*self.kinds, "denied"), 0)
        self.lock = threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """A client that has gone away is no news here."""

    def choose(self, path):
        with self.lock:
            self.requests += 1
            fault = None
            if "forbidden" in path:
                fault = "denied"
            elif self.chance.random() < self.rate:
                fault = self.chance.choice(self.kinds)
            if fault:
                self.faults[fault] += 1
            return fault

    @contextlib.contextmanager
    def running(self):
        """Serve while the body runs."""
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
