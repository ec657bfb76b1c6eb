"""Files and objects by URL, local or remote, through fsspec."""

import contextlib
import errno
import io
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import (
    AccessDenied,
    MediaError,
    NotFound,
    OutputError,
    StorageError,
    Throttled,
)

# The largest remote object that is fetched whole.
WHOLE_FETCH_BYTES = 64 << 20
# How many bytes come in the time that one more request takes (30 ms at 1 Gb/s and more).
REQUEST_BYTES = 4 << 20
# What is read ahead in a remote object: at first, for headers; and at least and most later on.
HEADER_BYTES = 1 << 20
READ_AHEAD_BYTES = (256 << 10, 8 << 20)

# How the names of files begin that are not complete yet.
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Stat:
    """What tells whether an object has changed. `mtime` in seconds; absent parts are None."""

    size_bytes: int | None
    mtime: float | None
    etag: str | None


_URL = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*://)(?P<user>[^\s/@]*@)?(?P<rest>[^\s'\"<>)]*)")
_SECRET_PARAMETER = re.compile(
    r"(?P<name>[?&;](?:x-(?:amz|goog|oss|cos)-[^=&\s]*|[^=&\s]*(?:sig|signature|token|secret|password"
    r"|credential|accesskeyid|accessid|policy|key|hmac|auth)[^=&\s]*|expires|s[eprtv]|hdn[a-z]*))"
    r"=[^&;\s]*",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """A text with the credentials in its URLs taken out: of users, and of signed addresses.

    What is left of an address is the same however often it is signed anew. Text without URLs is
    returned as it is, but for bytes of file names that are not UTF-8: they are escaped, since
    neither Parquet nor a terminal can take them.
    """

    def clean(match: re.Match[str]) -> str:
        rest = _SECRET_PARAMETER.sub(r"\g<name>=REDACTED", match["rest"])
        return match["scheme"] + rest

    return _URL.sub(clean, text).encode("utf-8", "backslashreplace").decode()


def locate(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL or local path, and the path inside it."""
    fs, path = fsspec.core.url_to_fs(url)
    return fs, str(path)


def is_local(url: str) -> bool:
    """Whether a URL or path lies on this machine's own file system."""
    return isinstance(locate(url)[0], LocalFileSystem)


def absolute(url: str) -> str:
    """A local path made absolute; any other URL as it is."""
    if "://" in url and not url.startswith("file://"):
        return url
    return str(Path(url.removeprefix("file://")).absolute())


def join(base: str, *parts: str) -> str:
    """A path below a URL or local folder."""
    return "/".join([base.rstrip("/"), *parts])


def unstrip(fs: Any, path: str) -> str:
    """The full address of a path as a file system lists it: a bare path when local."""
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def stat_from_info(info: dict[str, Any]) -> Stat:
    """Size, time and etag from an fsspec listing entry."""
    modified = next(
        (info[k] for k in ("mtime", "LastModified", "last_modified") if k in info), None
    )
    if isinstance(modified, datetime):
        modified = modified.timestamp()
    mtime = float(modified) if isinstance(modified, int | float) else None
    etag = info.get("ETag") or info.get("etag")
    if etag and mtime is not None:
        mtime = float(
            int(mtime)
        )  # listings of some stores are finer than what they say of one object
    return Stat(int(info.get("size") or 0), mtime, str(etag).strip('"') if etag else None)


def stat(url: str) -> Stat:
    """Size, time and etag of one object. Raises MediaError."""
    with _media_errors(url):
        fs, path = locate(url)
        info = fs.info(path)
        if info["type"] == "directory":
            raise NotFound(f"{url}: a folder, not a file.")
        return stat_from_info(info)


def read_head(url: str, count: int = 4096) -> bytes:
    """The first bytes of an object. Raises MediaError."""
    with _media_errors(url):
        fs, path = locate(url)
        with fs.open(path, "rb", block_size=max(count, 65536), cache_type="none") as file:
            return bytes(file.read(count))


@contextlib.contextmanager
def open_media(url: str, places: int | None = None) -> Iterator[str | IO[bytes]]:
    """Something a decoder can open: a local path, or a seekable file object. Raises MediaError.

    places: in how many places of the file something will be read, besides its header and its
    index; None when all of it will be. A remote object is fetched whole when that takes no longer
    than a request for each of them, and read in ranges otherwise.
    """
    most = WHOLE_FETCH_BYTES
    if places is not None:
        most = min(most, (places + 2) * REQUEST_BYTES)
    with _media_errors(url):
        fs, path = locate(url)
        if isinstance(fs, LocalFileSystem):
            source: str | IO[bytes] = _local(path)
        elif fs.size(path) <= most:
            source = io.BytesIO(fs.cat_file(path))
        else:
            source = fs.open(path, "rb", block_size=HEADER_BYTES, cache_type="readahead")
    try:
        yield source
    finally:
        if not isinstance(source, str):
            source.close()


def _local(path: str) -> str | IO[bytes]:
    """The path, of a file that can be read; the open file where FFmpeg cannot take its name."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return Path(path).open("rb")
    with Path(path).open("rb"):  # absent and forbidden files fail here, with their own names
        return path


def read_ahead(source: Any, count: float) -> None:
    """Have what `open_media` gave fetch so many bytes at a time, if it is read in ranges."""
    cache = getattr(source, "cache", None)
    if cache is not None:
        least, most = READ_AHEAD_BYTES
        cache.blocksize = int(min(max(count, least), most))


@contextlib.contextmanager
def _media_errors(url: str) -> Iterator[None]:
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise NotFound(f"{url}: no such file or object.") from error
    except PermissionError as error:
        raise AccessDenied(f"{url}: reading is not permitted. Check its access rights.") from error
    except (OSError, ValueError, ImportError) as error:
        # s3fs reports SlowDown, ServiceUnavailable and their like as EBUSY.
        if getattr(error, "errno", None) == errno.EBUSY:
            raise Throttled(f"{url}: the store is too busy ({error}).") from error
        raise StorageError(f"{url}: cannot be read ({error}).") from error


def database() -> duckdb.DuckDBPyConnection:
    """DuckDB in memory; what needs more than 1 GB goes to files in the temporary folder."""
    return duckdb.connect(config={"memory_limit": "1GB", "temp_directory": tempfile.gettempdir()})


class Output:
    """The output folder: a URL that all workers can reach."""

    def __init__(self, url: str) -> None:
        self.url = absolute(url)
        self.fs, self.path = locate(self.url)
        self.local = isinstance(self.fs, LocalFileSystem)

    def create(self) -> None:
        """Make the folder. Raises OutputError."""
        try:
            self.fs.makedirs(self.path, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.url}: cannot be created ({error}).") from error

    def names(self) -> list[str]:
        """Names of what is in the folder; none when it does not exist, as in an object store."""
        try:
            found = self.fs.ls(self.path, detail=False)
        except FileNotFoundError:
            return []
        return [name for path in found if (name := str(path).rstrip("/").rsplit("/", 1)[-1])]

    def inside(self, *parts: str) -> str:
        """The path of something in the folder, for `fs`."""
        return join(self.path, *parts)

    def arrow_filesystem(self) -> Any:
        """The same file system for pyarrow and Ray Data."""
        if self.local:
            return pafs.LocalFileSystem()
        return pafs.PyFileSystem(pafs.FSSpecHandler(self.fs))

    def parquet_files(self, *parts: str) -> list[str]:
        """The Parquet files directly in a folder, sorted; none when it does not exist."""
        self.fs.invalidate_cache()
        found = self.fs.glob(join(self.inside(*parts), "*.parquet"))
        return sorted(str(path) for path in found)

    def dataset(self, files: list[str], schema: pa.Schema) -> pads.Dataset | pa.Table:
        """Parquet files of one schema as one table, read when it is used; there may be none."""
        if not files:
            return schema.empty_table()
        return pads.dataset(files, schema=schema, filesystem=self.arrow_filesystem())

    def scan(self, files: list[str], schema: pa.Schema, columns: list[str]) -> pa.RecordBatchReader:
        """Columns of Parquet files of one schema, to be read once.

        Unlike a dataset that is scanned, it does not keep the footers of all files in memory: a
        large run has thousands, of 150 kB each.
        """
        dataset = pads.dataset(files, schema=schema, filesystem=self.arrow_filesystem())
        return dataset.scanner(columns=columns, cache_metadata=False).to_reader()

    @contextlib.contextmanager
    def publish(self, *parts: str) -> Iterator[Path]:
        """A local path to write to; what is there at the end replaces the target in one step.

        When the body raises, the target stays as it was and nothing is left behind. Raises
        OutputError when it cannot be written.
        """
        target = self.inside(*parts)
        partial: Path | None = None
        try:
            self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            folder = Path(target).parent if self.local else None
            handle, name = tempfile.mkstemp(prefix=_PARTIAL, dir=folder)
            os.close(handle)
            partial = Path(name)
            yield partial
            if self.local:
                partial.chmod(0o644)
                partial.replace(target)
            else:
                self.fs.put_file(str(partial), target)
        except OSError as error:
            raise OutputError(
                f"{join(self.url, *parts)}: cannot be written ({error.strerror or error}). Check "
                "the space and the rights there; the same command goes on from here."
            ) from error
        finally:
            if partial is not None:
                partial.unlink(missing_ok=True)

    def remove_partials(self) -> None:
        """Remove what killed processes were writing to; only for whoever alone may write here."""
        if self.local:
            for path in Path(self.path).glob(f"**/{_PARTIAL}*"):
                path.unlink(missing_ok=True)

    def write_text(self, text: str, *parts: str) -> None:
        """Replace a small text file in one step."""
        with self.publish(*parts) as path:
            path.write_text(text, encoding="utf-8")

    def read_text(self, *parts: str) -> str | None:
        """A small text file, or None when there is none."""
        try:
            return str(self.fs.read_text(self.inside(*parts), encoding="utf-8"))
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def parquet_writer(self, schema: pa.Schema, *parts: str) -> Iterator[pq.ParquetWriter]:
        """Write one Parquet file, published in one step when the body ends well."""
        with self.publish(*parts) as path, pq.ParquetWriter(path, schema, compression="zstd") as w:
            yield w
