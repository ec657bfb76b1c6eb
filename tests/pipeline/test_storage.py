import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.errors import AccessDenied, NotFound
from pipeline.storage import Output


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
