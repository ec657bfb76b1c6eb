import http.server
import json
import os
import string
import threading
import urllib.parse
import zipfile

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from web import serving

from pipeline import catalog, schemas, storage
from pipeline.errors import CatalogError
from pipeline.pairing import References


def uris(found):
    return found.table["uri"].to_pylist()


@pytest.fixture
def folder(tmp_path):
    for name in ("b.mp4", "a.jpg", "sub/c.mkv", "notes.txt", ".hidden.mp4", ".git/d.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_folder_is_listed_recursively_sorted_without_hidden_files(folder):
    found = catalog.read(str(folder))
    assert uris(found) == [str(folder / n) for n in ("a.jpg", "b.mp4", "notes.txt", "sub/c.mkv")]
    assert found.table["explicit"].to_pylist() == [True, True, False, True]


def test_a_glob_takes_what_matches(folder):
    assert uris(catalog.read(f"{folder}/*.mp4")) == [str(folder / "b.mp4")]
    assert uris(catalog.read(f"{folder}/**/*.mkv")) == [str(folder / "sub/c.mkv")]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ("a.jpg", "b.mp4", "notes.txt", "sub/c.mkv", "sub/sub/e.mp4")),
        ("**", ("a.jpg", "b.mp4", "notes.txt", "sub/c.mkv", "sub/sub/e.mp4")),
        ("**/*", ("a.jpg", "b.mp4", "notes.txt", "sub/c.mkv", "sub/sub/e.mp4")),
        ("**/*.mp4", ("b.mp4", "sub/sub/e.mp4")),
        ("**/s*", ("sub/c.mkv", "sub/sub/e.mp4")),
        ("**/sub/**/*.m*", ("sub/c.mkv", "sub/sub/e.mp4")),
        ("s?b/[!x]*", ("sub/c.mkv", "sub/sub/e.mp4")),
        ("*/sub/e.mp4", ("sub/sub/e.mp4",)),
        (".*", (".git/d.mp4", ".hidden.mp4")),
        ("**/.*", (".git/d.mp4", ".hidden.mp4", "sub/.e.mp4")),
        (".git/*", (".git/d.mp4",)),
        (".g*/**/*.mp4", (".git/d.mp4",)),
    ],
)
def test_a_glob_takes_each_file_once_and_hidden_ones_when_a_dot_asks(folder, pattern, names):
    for name in ("sub/sub/e.mp4", "sub/.e.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    found = catalog.read(f"{folder}/{pattern}")
    assert uris(found) == sorted(str(folder / name) for name in names)
    assert found.duplicates == 0


class Guarded(LocalFileSystem):
    """Does not let one folder be listed."""

    protocol = "guarded"

    def ls(self, path, detail=False, **kwargs):
        if path.endswith("/open/shut"):
            raise PermissionError("An error occurred (403): Forbidden")
        return super().ls(path, detail=detail, **kwargs)


@pytest.mark.parametrize("source", ["", "/*", "/**/*.mp4", "/*/*/*.mp4", "/op*"])
def test_a_folder_that_cannot_be_listed_is_an_error_that_names_it(tmp_path, source):
    fsspec.register_implementation("guarded", Guarded, clobber=True)
    (tmp_path / "open/shut").mkdir(parents=True)
    for name in ("a.mp4", "open/b.mp4", "open/shut/c.mp4"):
        (tmp_path / name).touch()
    with pytest.raises(CatalogError, match=rf"{tmp_path}/open/shut: .* listed .*403.*rights"):
        catalog.read(f"guarded://{tmp_path}{source}")
    # What a pattern does not lead into need not be listed.
    found = catalog.read(f"guarded://{tmp_path}/op*/b.mp4")
    assert uris(found) == [str(tmp_path / "open/b.mp4")]


class Bucket(http.server.BaseHTTPRequestHandler):
    """Lists a bucket as S3 does, but for what lies below `shut/`."""

    keys = (
        "both", "both/a.mp4", "open/b.mp4", "open/shut/c.mp4", "clips/a.mp4", "masters/a.mov",
        "shards//1::2.mp4", "shards/.hidden/d.mp4", "shards/1/", "shards/1/e.mp4",
    )  # fmt: skip

    def do_GET(self):
        asked = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        prefix = asked.get("prefix", [""])[0]
        if prefix.endswith("shut/"):
            self.answer(403, "<Error><Code>AccessDenied</Code><Message>No.</Message></Error>")
            return
        below = [key.removeprefix(prefix) for key in self.keys if key.startswith(prefix)]
        deep = [k for k in below if "/" in k and asked.get("delimiter")]
        files = [f"<Contents><Key>{prefix}{k}</Key><Size>1</Size></Contents>" for k in below
                 if k not in deep]  # fmt: skip
        folders = {k.split("/")[0] for k in deep}
        named = [f"<CommonPrefixes><Prefix>{prefix}{f}/</Prefix></CommonPrefixes>" for f in folders]
        self.answer(200, f"<ListBucketResult>{''.join(files + named)}</ListBucketResult>")

    def do_HEAD(self):
        self.answer(200 if self.path.split("/", 2)[-1] in self.keys else 404, "")

    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def bucket(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        s3fs.S3FileSystem.clear_instance_cache()
        yield
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("source", ["bucket/**/*.mp4", "bucket/*/*/*.mp4", "bucket/open/s*"])
def test_a_prefix_that_cannot_be_listed_is_an_error_that_names_it(source):
    with pytest.raises(CatalogError, match=r"s3://bucket/open/shut: .* listed .*No\..*rights"):
        catalog.read(f"s3://{source}")


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("source", ["bucket", "bucket/*", "bucket/shards", "bucket/sh*"])
def test_keys_below_a_prefix_are_listed_flat_with_empty_and_odd_parts_of_names(source):
    found = catalog.read(f"s3://{source}")
    expected = ["s3://bucket/shards//1::2.mp4", "s3://bucket/shards/1/e.mp4"]
    assert [uri for uri in uris(found) if "shards" in uri] == expected
    assert storage.locate(expected[0])[1] == "bucket/shards//1::2.mp4"


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("source", ["b*", "b*/*", "both*"])
def test_a_name_may_be_of_an_object_and_of_a_folder(source):
    found = uris(catalog.read(f"s3://bucket/{source}"))
    assert found[-1] == "s3://bucket/both/a.mp4"
    assert found[:-1] == ([] if "/" in source else ["s3://bucket/both"])


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("source", ["clips/", "clips/*"])
def test_references_are_found_whichever_name_of_a_scheme_is_given(source):
    references = References(root="s3a://bucket/masters")
    found = catalog.read_pairs(f"s3a://bucket/{source}", references).table
    assert found["uri"].to_pylist() == ["s3://bucket/clips/a.mp4"]
    assert found["reference_uri"].to_pylist() == ["s3://bucket/masters/a.mov"]


def test_links_to_files_are_files_and_pipes_are_not(folder):
    (folder / "sub/link.mp4").symlink_to(folder / "b.mp4")
    (folder / "sub/dangling.mp4").symlink_to(folder / "gone.mp4")
    os.mkfifo(folder / "sub/pipe.mp4")
    (folder / "sub/to-pipe.mp4").symlink_to(folder / "sub/pipe.mp4")
    expected = [str(folder / "sub" / name) for name in ("c.mkv", "link.mp4")]
    assert uris(catalog.read(str(folder / "sub"))) == expected
    assert uris(catalog.read(f"{folder}/sub/*")) == expected


@pytest.mark.parametrize("source", ["", "/*", "/**", "/**/*.mp4", "/**/[a-z]*"])
def test_links_to_folders_are_followed_and_each_folder_is_listed_once(tmp_path, source):
    tree, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    for name in ("tree/real/a.mp4", "elsewhere/b.mp4", "elsewhere/.git/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tree / "again").symlink_to(tree / "real")  # its name comes first, and yields to the folder's
    (tree / "out").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tree)
    (tree / "real/up").symlink_to("..")
    (tree / ".hidden").symlink_to(elsewhere / ".git")
    (tree / "dangling").symlink_to(tmp_path / "gone")
    found = catalog.read(f"{tree}{source}")
    assert uris(found) == [f"{tree}/out/b.mp4", f"{tree}/real/a.mp4"]


def test_one_file_is_a_catalog(folder):
    found = catalog.read(str(folder / "notes.txt"))
    assert uris(found) == [str(folder / "notes.txt")]
    assert found.table["explicit"].to_pylist() == [True]


@pytest.mark.parametrize("name", ["absent", "absent/*.mp4"])
def test_nothing_there_is_an_error_that_names_it(tmp_path, name):
    with pytest.raises(CatalogError, match="absent"):
        catalog.read(str(tmp_path / name))


def write_manifest(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0])] + [",".join(str(v) for v in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_csv_keeps_identifiers_and_numbers_what_they_are(tmp_path):
    (tmp_path / "list.csv").write_text(
        "uri,id,views,plus,share,long,nothing\n"
        "a.mp4,007,12,+49,0.5,12345678901234567890,\nb.mp4,10,-3,31,1e3,1,\n"
    )
    table = catalog.read(str(tmp_path / "list.csv")).table
    kinds = {"id": "string", "views": "int64", "plus": "string", "share": "double"}
    for name, kind in (kinds | {"long": "string", "nothing": "string"}).items():
        assert table.schema.field(name).type == pa.type_for_alias(kind), name
    assert table["id"].to_pylist() == ["007", "10"]
    assert table["nothing"].to_pylist() == [None, None]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "ndjson"])
def test_a_manifest_keeps_its_order_and_its_columns(tmp_path, suffix):
    rows = [
        {"uri": "z.mp4", "split": "train", "score": 3},
        {"uri": "/abs/a.mp4", "split": "test", "score": 4},
        {"uri": "s3://bucket/key.mp4", "split": "train", "score": 5},
    ]
    found = catalog.read(write_manifest(tmp_path / f"list.{suffix}", rows))
    assert uris(found) == [str(tmp_path / "z.mp4"), "/abs/a.mp4", "s3://bucket/key.mp4"]
    assert found.table["split"].to_pylist() == ["train", "test", "train"]
    # `score` is ours; the user's own comes out under another name, not lost.
    assert found.table["manifest_score"].to_pylist() == [3, 4, 5]


def test_no_column_of_a_manifest_collides_with_ours(tmp_path):
    names = ["Score", "URI", "pts_s", "score_p25", "worst_1s_start_s", "Width", "n_known", "code"]
    row = {"uri": "a.mp4", **dict.fromkeys(names, 1), "label": 2}
    found = catalog.read(write_manifest(tmp_path / "list.jsonl", [row]))
    assert found.table.column_names == [
        *catalog.COLUMNS.names, *(f"manifest_{n}" for n in names), "label",
    ]  # fmt: skip


def test_columns_without_a_name_are_given_one(tmp_path):
    (tmp_path / "a.csv").write_text(",uri,mos,\n0,a.mp4,3,x\n1,b.mp4,4,y\n")
    (tmp_path / "b.csv").write_text(",Unnamed,uri\n0,u,a.mp4\n")
    found = catalog.read(str(tmp_path / "a.csv"))
    assert [field.name for field in found.extras] == ["unnamed", "mos", "unnamed_2"]
    assert found.table["unnamed_2"].to_pylist() == ["x", "y"]
    found = catalog.read(str(tmp_path / "b.csv"))
    assert [field.name for field in found.extras] == ["unnamed_2", "Unnamed"]


def test_line_breaks_in_the_fields_of_a_long_csv_are_data(tmp_path):
    captions = [f"line {n}\n" * 200 for n in range(2000)]
    table = pd.DataFrame({"uri": [f"{n}.mp4" for n in range(2000)], "n": 7, "caption": captions})
    table.to_csv(tmp_path / "list.csv", index=False)
    assert (tmp_path / "list.csv").stat().st_size > 2 << 20
    found = catalog.read(str(tmp_path / "list.csv")).table
    assert found["caption"].to_pylist() == captions
    assert found["n"].to_pylist() == [7] * 2000


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_row_may_be_longer_than_a_megabyte(tmp_path, suffix):
    rows = [{"uri": "a.mp4", "note": "x" * (3 << 20)}, {"uri": "b.mp4", "note": "y"}]
    found = catalog.read(write_manifest(tmp_path / f"list.{suffix}", rows))
    assert [len(note) for note in found.table["note"].to_pylist()] == [3 << 20, 1]


def test_an_item_named_twice_is_one_item_and_counted(tmp_path):
    rows = [{"uri": "a.mp4", "n": 1}, {"uri": "b.mp4", "n": 2}, {"uri": "./a.mp4", "n": 3}]
    found = catalog.read(write_manifest(tmp_path / "list.csv", rows))
    assert uris(found) == [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]
    assert found.table["n"].to_pylist() == [1, 2]
    assert found.duplicates == 1


def test_a_manifest_without_uri_is_refused_with_its_columns(tmp_path):
    with pytest.raises(CatalogError, match="path"):
        catalog.read(write_manifest(tmp_path / "list.csv", [{"path": "a.mp4"}]))


def test_an_empty_uri_is_refused_with_its_row(tmp_path):
    with pytest.raises(CatalogError, match="row 2"):
        catalog.read(write_manifest(tmp_path / "list.jsonl", [{"uri": "a"}, {"uri": ""}]))


def test_a_broken_manifest_is_refused_by_name(tmp_path):
    (tmp_path / "list.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CatalogError, match=r"list\.parquet"):
        catalog.read(str(tmp_path / "list.parquet"))


def test_any_fsspec_url_can_be_listed():
    fs = fsspec.filesystem("memory")
    for name in ("/cat/x.mp4", "/cat/deep/y.jpg"):
        fs.pipe(name, b"x")
    assert uris(catalog.read("memory://cat")) == ["memory:///cat/deep/y.jpg", "memory:///cat/x.mp4"]


@pytest.mark.parametrize("inside", ["d", "d/*", "**/*.mp4"])
def test_folders_whose_files_have_no_address_of_their_own_are_refused(tmp_path, inside):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("d/a.mp4", "x")
    with pytest.raises(CatalogError, match=r"a\.zip: folders cannot be listed .*manifest"):
        catalog.read(f"zip://{inside}::{tmp_path}/a.zip")
    file = f"zip://d/a.mp4::{tmp_path}/a.zip"
    assert uris(catalog.read(file)) == [file]
    storage.stat(file)


def test_folders_of_a_server_that_addresses_do_not_name_are_refused(tmp_path):
    class Server(LocalFileSystem):
        protocol, host = "server", "media.example"

    fsspec.register_implementation("server", Server, clobber=True)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(CatalogError, match="folders cannot be listed"):
        catalog.read(f"server://{tmp_path}")


def test_a_name_that_is_not_text_keeps_its_bytes_and_shows_escaped(tmp_path):
    (tmp_path / "plain.mp4").touch()
    os.rename(tmp_path / "plain.mp4", os.fsencode(tmp_path) + b"/caf\xe9.mp4")  # noqa: PTH104
    found = catalog.read(str(tmp_path))
    assert uris(found) == [f"{tmp_path}/caf\\udce9.mp4"]
    (address,) = found.table["address"].to_pylist()
    assert os.path.exists(catalog.from_bytes(address))  # noqa: PTH110


names = st.text(string.printable, max_size=30).filter(lambda s: s.strip() == s != "uri")
cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    columns=st.lists(names, max_size=5, unique=True),
    paths=st.lists(cells.filter(bool), min_size=1, max_size=8),
    data=st.data(),
)
def test_any_manifest_keeps_each_item_once_with_its_columns(tmp_path, columns, paths, data):
    """Whatever is in it, `../` and the names of our own columns too: all of it is data."""
    given_rows = [{"uri": p, **{c: data.draw(cells) for c in columns}} for p in paths]
    pq.write_table(pa.Table.from_pylist(given_rows), tmp_path / "list.parquet")
    found = catalog.read(str(tmp_path / "list.parquet"))
    rows = found.table.to_pylist()
    assert len(rows) + found.duplicates == len(paths)
    assert len({row["uri"] for row in rows}) == len(rows)
    assert len(found.extras) == len(columns)
    lower = [name.lower() for name in found.table.column_names]
    assert len(set(lower)) == len(lower)
    assert not any(schemas.is_reserved(field.name) for field in found.extras)
    values = list(rows[0].values())[len(catalog.COLUMNS) :]
    assert values == [given_rows[0][c] for c in columns]


def test_items_that_differ_in_a_credential_alone_are_not_taken_for_one(tmp_path):
    urls = ["https://h/get?file_key=1", "https://h/get?file_key=2"]
    write_manifest(tmp_path / "a.csv", [{"uri": url} for url in urls])
    with pytest.raises(CatalogError, match=r"get\?file_key=REDACTED.*credential"):
        catalog.read(str(tmp_path / "a.csv"))
    signed = [f"https://h/v.mp4?id=1&X-Amz-Signature={s}" for s in ("aa", "bb")]
    write_manifest(tmp_path / "b.csv", [{"uri": url} for url in signed])
    assert catalog.read(str(tmp_path / "b.csv")).duplicates == 1
    frames = [f"https://h/frame?id=7&st={second}" for second in (10, 20)]
    write_manifest(tmp_path / "c.csv", [{"uri": url} for url in frames])
    assert catalog.read(str(tmp_path / "c.csv")).table["uri"].to_pylist() == frames


def test_a_signed_address_of_a_manifest_leads_to_what_it_lists(tmp_path):
    (tmp_path / "list.csv").write_text("uri\na.mp4\n")
    with serving(tmp_path) as base:
        found = catalog.read(f"{base}/list.csv?X-Amz-Signature=aa/bb").table
    assert found["uri"].to_pylist() == [f"{base}/a.mp4"]


def test_columns_of_any_type_are_carried_along_or_refused_by_name(tmp_path):
    half = pa.array([[0.5, 2.0], None], pa.list_(pa.float16()))
    table = pa.table({"uri": ["a.mp4", "b.mp4"], "embedding": half})
    pq.write_table(table, tmp_path / "a.parquet")
    (field,) = catalog.read(str(tmp_path / "a.parquet")).extras
    assert field.type == pa.list_(pa.float32())
    for kind in (pa.list_(pa.float16(), 2), pa.large_list(pa.float16())):
        column = pa.array([[0.5, 2.0], [1.0, 4.0]], kind)
        split = pa.array(["train", "test"]).dictionary_encode()
        table = pa.table({"uri": ["a.mp4", "b.mp4"], "embedding": column, "split": split})
        pq.write_table(table, tmp_path / "c.parquet")
        found = catalog.read(str(tmp_path / "c.parquet")).table
        assert found["embedding"].to_pylist() == [[0.5, 2.0], [1.0, 4.0]]
        assert found["split"].to_pylist() == ["train", "test"]
    table = pa.table({"uri": ["a.mp4", "b.mp4"], "took": pa.array([None, 5], pa.duration("s"))})
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(CatalogError, match=r"column took is of type duration\[s\]"):
        catalog.read(str(tmp_path / "b.parquet"))
