import contextlib
import http.server
import os
import resource
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import web

from pipeline import catalog, storage
from pipeline.errors import (
    AccessDenied,
    CatalogError,
    ConfigError,
    NotFound,
    OutputError,
    StorageError,
    Throttled,
)
from pipeline.media.decode import Limits, decode_at
from pipeline.media.probe import probe
from pipeline.media.sample import SampleSpec
from pipeline.output import Output, database
from pipeline.storage import redacted


def test_a_table_replaces_the_old_one_whole_or_not_at_all(tmp_path):
    output = Output(str(tmp_path / "out"))
    output.create()
    schema = pa.schema([("n", pa.int64())])
    with output.parquet_writer(schema, "scores", "m.parquet") as writer:
        writer.write_table(pa.table({"n": [1, 2]}))

    def write_and_break() -> None:
        with output.parquet_writer(schema, "scores", "m.parquet") as writer:
            writer.write_table(pa.table({"n": [3]}))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_break()
    assert pq.read_table(tmp_path / "out/scores/m.parquet")["n"].to_pylist() == [1, 2]
    assert [p.name for p in (tmp_path / "out/scores").iterdir()] == ["m.parquet"]


def test_a_full_temporary_folder_is_an_error_that_names_it(tmp_path):
    output = Output(str(tmp_path / "out"))
    query = "SELECT md5(i::VARCHAR) AS m FROM range(2000000) t(i) ORDER BY m"
    with database() as connection:
        connection.execute("SET memory_limit='30MB'; SET max_temp_directory_size='5MB'")
        with pytest.raises(OutputError, match=r"too little room.*TMPDIR"), output.reading():
            connection.execute(query).fetchall()


def test_a_web_server_without_etags_tells_changes_by_the_time(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"12")
    with web.serving(tmp_path) as base:
        for changed in (1e9, 1.1e9):
            os.utime(path, (changed, changed))
            assert storage.stat(f"{base}/a.mp4") == storage.Stat(2, changed, None)


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_old_one(tmp_path):
    output = Output(str(tmp_path))
    output.write_text("old", "run.json")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"run\.json: cannot be written"):
            output.write_text("new" * 100, "run.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"run.json": "old"}


def test_remote_outputs_work_alike():
    output = Output("memory://bucket/out")
    output.create()
    with output.parquet_writer(pa.schema([("n", pa.int64())]), "plan", "m.parquet") as writer:
        writer.write_table(pa.table({"n": [7]}))
    (file,) = output.parquet_files("plan")
    assert pq.read_table(file, filesystem=output.arrow_filesystem())["n"].to_pylist() == [7]
    output.write_text("hello", "run.json")
    assert output.read_text("run.json") == "hello"


def test_an_absent_file_is_not_found(tmp_path):
    for read in (storage.stat, storage.read_head):
        with pytest.raises(NotFound, match=r"gone\.mp4"):
            read(str(tmp_path / "gone.mp4"))
    with pytest.raises(NotFound), storage.open_media(str(tmp_path / "gone.mp4")):
        pass


UNREADABLE = {
    "gs://b/a.mp4": r"gs://b/a\.mp4: .* pip install .*\[gcs\]",
    "az://c/a.mp4": r"az://c/a\.mp4: .* pip install .*\[azure\]",
    "oss://b/a.mp4": r"oss://b/a\.mp4: .* Install ossfs",
    "foo://bar": "foo://bar: .* known: foo.* address",
}


@pytest.mark.parametrize("url", UNREADABLE)
def test_a_scheme_that_nothing_reads_is_an_error_that_says_what_to_install(url, monkeypatch):
    for package in ("gcsfs", "adlfs", "ossfs"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    for use in (storage.locate, catalog.read, Output):
        with pytest.raises(ConfigError, match=UNREADABLE[url]):
            use(url)
    with pytest.raises(StorageError, match=UNREADABLE[url]):
        storage.stat(url)


def test_a_store_that_cannot_be_opened_is_an_error_that_names_it(tmp_path):
    url = f"zip://a.mp4::{tmp_path}/gone.zip"
    with pytest.raises(CatalogError, match=r"gone\.zip: cannot be read"):
        catalog.read(url)
    with pytest.raises(OutputError, match=r"gone\.zip: cannot be used"):
        Output(url)


def test_two_colons_in_a_local_name_are_a_part_of_it(tmp_path):
    file = tmp_path / "x::y.mp4"
    file.write_bytes(b"pictures")
    (tmp_path / "list.csv").write_text("uri\nx::y.mp4\n")
    for source in (file, tmp_path / "list.csv", tmp_path / "x::*"):
        (address,) = catalog.read(str(source)).table["address"].to_pylist()
        assert storage.read_head(catalog.from_bytes(address)) == b"pictures"


def test_a_forbidden_file_is_access_denied(tmp_path, monkeypatch):
    import os

    path = tmp_path / "secret.mp4"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything: let the kernel say no another way
        import errno
        import pathlib

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(AccessDenied, match=r"secret\.mp4"), storage.open_media(str(path)):
        pass


def test_remote_media_open_like_local_ones(clips):
    import fsspec

    from pipeline.media.decode import Limits, decode_at

    fsspec.filesystem("memory").pipe("/clips/a.mp4", clips["h264.mp4"].read_bytes())
    local = decode_at(str(clips["h264.mp4"]), [0.5], [1.0], Limits(10**8, 10**9))
    remote = decode_at("memory://clips/a.mp4", [0.5], [1.0], Limits(10**8, 10**9))
    assert (local.shots[0].rgb == remote.shots[0].rgb).all()


SIGNED = [
    ("https://b.s3.amazonaws.com/v.mp4?X-Amz-Credential=AKIA&X-Amz-Signature=f00", "AKIA", "f00"),
    (
        "https://b.s3.amazonaws.com/v.mp4?AWSAccessKeyId=AKIA&Signature=f%2B00&Expires=12",
        "AKIA",
        "f",
    ),
    ("https://acc.blob.core.windows.net/c/v.mp4?sv=2024&se=tomorrow&sig=s3cr3t", "s3cr3t", "tomo"),
    ("https://storage.googleapis.com/b/v.mp4?X-Goog-Signature=s3cr3t&GoogleAccessId=me", "s3cr3t"),
    ("https://user:hunter2@host/v.mp4", "hunter2", "user"),
    ("abfss://user:hunter2@host/v.mp4", "hunter2", "user"),
    ("https://cdn/a (1) v.mp4?Expires=9&Signature=s3cr3t&Key-Pair-Id=KPI7", "s3cr3t", "KPI7"),
    ("ftp://hunter2@host/v.mp4", "hunter2"),
    ("https://host/v.mp4?api_key=k3y&client-secret=s3cr3t&auth=a6", "k3y", "s3cr3t", "a6"),
    ("https://cdn/v.mp4?Policy=p0l&Key-Pair-Id=KPI7&token=t0k", "p0l", "KPI7", "t0k"),
    (
        "https://host/v.mp4?accessToken=k3y&sessiontoken=s3cr3t&userPassword=a6",
        "k3y",
        "s3cr3t",
        "a6",
    ),
    (
        "https://host/v.mp4?secretKey=k3y&privatekey=s3cr3t&oauth=a6&auth%5Fcode=b7",
        "k3y",
        "s3",
        "a6",
        "b7",
    ),
    (
        "https://host/v.mp4?api_key=SG.abc.def&key=wJal/K7MDENG&x-api-key=a.b.c",
        "SG.",
        "wJal",
        "a.b",
    ),
]


@pytest.mark.parametrize("address", SIGNED, ids=lambda a: a[0][:30])
def test_credentials_in_addresses_are_taken_out_also_inside_of_messages(address):
    url, *secrets = address
    for text in (url, f"{url}: cannot be read (403, url='{url}').", f"see <{url}> or {url}"):
        for secret in secrets:
            assert secret not in redacted(text)
    assert "v.mp4" in redacted(url)


@pytest.mark.parametrize(
    "text",
    [
        "/data/what?token=1.mp4",
        "s3://bucket/key=5/v.mp4",
        "https://host/v?id=5&page=2",
        "https://host/get?key=photos/1.jpg&author=me&keyframe=7&design=x",
        "https://host/get?objectKey=a%2Fb.MP4&monkey=1",
        "plain text",
        "https://host/frame?id=7&st=10&se=2&sp=1",
        "https://host/get?expires=never&policy=7",
        "s3://bucket/x&st=1;sig=2?token=3.jpg",
        "abfss://container@account.dfs.core.windows.net/v.mp4",
    ],
)
def test_what_holds_no_credentials_stays_as_it_is(text):
    assert redacted(text) == text


def test_an_address_signed_anew_is_the_same_item():
    first = redacted("https://h/v.mp4?id=7&X-Amz-Date=1&X-Amz-Signature=aa")
    assert first == redacted("https://h/v.mp4?id=7&X-Amz-Date=2&X-Amz-Signature=bb")
    assert first != redacted("https://h/v.mp4?id=8&X-Amz-Date=1&X-Amz-Signature=aa")
    for signed in (
        "https://h/{}?Expires={}&Signature={}&Key-Pair-Id=k",
        "https://h/{}?st={}&sig={}",
    ):
        for name in ("v.mp4", "clip (1).mp4", "it's.mp4"):
            once, again = (redacted(signed.format(name, *of)) for of in ((1, "aa"), (2, "bb")))
            assert once == again
            assert name in once


class Chunked(http.server.BaseHTTPRequestHandler):
    """Sends a file in chunks, without saying how long it is."""

    body = b""
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        for start in range(0, len(self.body), 100_000):
            part = self.body[start : start + 100_000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        pass


def test_an_object_whose_server_does_not_tell_its_size_is_read_whole(clips, monkeypatch):
    # More than comes in one piece.
    body = clips["h264.mp4"].read_bytes() + bytes(range(256)) * (3 << 12)
    serve = type("Serve", (Chunked,), {"body": body})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.mp4"
        with storage.open_media(url) as file:
            assert file.read() == body
        monkeypatch.setattr(storage, "WHOLE_FETCH_BYTES", 2 << 20)
        with pytest.raises(StorageError, match="Content-Length"), storage.open_media(url):
            pass
        server.shutdown()


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers with the status in the path, or, beyond the first `good` bytes, with 503."""

    body, good = b"", 0

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        part = self.path.strip("/").split("/")[0]
        if part.isdigit():
            self.answer(int(part))
            return
        asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
        begin, end = int(asked[0]), min(int(asked[1] or 1 << 40) + 1, len(self.body))
        if self.command == "GET" and end > self.good:
            self.answer(503)
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(self.body)}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.body[begin:end])

    def answer(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(**fields):
    handler = type("Serve", (Refusing,), fields)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


STATUSES = {
    404: NotFound, 410: NotFound, 401: AccessDenied, 403: AccessDenied,
    429: Throttled, 503: Throttled, 500: StorageError, 502: StorageError,
}  # fmt: skip


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("read", [storage.stat, storage.read_head])
def test_what_a_web_server_answers_is_told_apart(status, read):
    with serving() as url, pytest.raises(STATUSES[status]) as caught:
        read(f"{url}/{status}/a.mp4")
    assert caught.value.transient == (status in (429, 503, 500, 502))


def test_a_store_that_cannot_be_reached_is_tried_again(monkeypatch):
    with serving() as url:
        pass
    with pytest.raises(StorageError, match=r"a\.mp4") as caught:
        storage.stat(f"{url}/a.mp4")
    assert caught.value.transient
    for name, value in {
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
        "ENDPOINT_URL": url,
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    with pytest.raises(StorageError, match=r"a\.mp4"):
        storage.read_head("s3://bucket/a.mp4")


def test_a_store_that_breaks_off_in_the_middle_is_no_damage_to_the_file(monkeypatch, clips):
    """Large files are read in ranges, by the decoders themselves."""
    monkeypatch.setattr(storage, "REQUEST_BYTES", 1)
    monkeypatch.setattr(storage, "HEADER_BYTES", 1 << 12)
    body = clips["h264.ts"].read_bytes()
    with serving(body=body, good=len(body) // 2) as url:
        with pytest.raises(Throttled, match="clip"):
            probe(f"{url}/clip.ts", SampleSpec.parse("all"), 1 << 20)
        with pytest.raises(Throttled, match="clip"):
            decode_at(f"{url}/clip.ts", [0.0, 1.5], [1.0, 1.0], Limits(1 << 20, 1 << 30))


def test_a_mistyped_bucket_is_an_error_and_no_request_to_make_one():
    asked = []

    class Stub(Refusing):
        def do_GET(self):
            asked.append(f"{self.command} {self.path}")
            self.answer(403)

        do_PUT = do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        output = Output("s3://typo/out")
        output.fs = s3fs.S3FileSystem(key="a", secret="b", endpoint_url=url)
        output.create()
        with pytest.raises(OutputError, match=r"run\.json: cannot be written"):
            output.write_text("{}", "run.json")
        output.arrow_filesystem().create_dir("typo/out/frame_scores")
        server.shutdown()
    assert asked
    assert {line.split("?")[0] for line in asked} == {"PUT /typo/out/run.json"}


def test_files_are_found_in_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    output = Output(str(tmp_path / "out[1] *"))
    output.write_text("{}", "runs", "a.json")
    assert output.files("*.json", "runs") == [str(tmp_path / "out[1] *" / "runs/a.json")]
    assert output.files("*.json", "absent") == []
