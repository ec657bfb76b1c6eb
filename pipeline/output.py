"""The output folder, and the database for what is written to it."""

import contextlib
import fnmatch
import itertools
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError, OutputError
from pipeline.storage import absolute, join, locate, schemes
from topiq_core.errors import TopiqError

if TYPE_CHECKING:
    import duckdb

# How the names of files begin that are not complete yet.
_PARTIAL = ".partial-"
# The folders of Parquet files that runs read.
_TABLES = ("plan", "_checkpoint", "frame_scores", "failures")


def database() -> "duckdb.DuckDBPyConnection":
    """DuckDB in memory; what needs more than 1 GB goes to files in the temporary folder."""
    import duckdb  # workers write outputs too, and ask no database

    # A folder of its own, made when it is needed and removed with the connection: names of files
    # in it are the same in all processes.
    folder = Path(tempfile.gettempdir()) / f"topiq-{uuid.uuid4().hex}"
    return duckdb.connect(config={"memory_limit": "1GB", "temp_directory": str(folder)})


class Output:
    """The output folder: a URL that all workers can reach. Raises ConfigError and OutputError."""

    def __init__(self, url: str) -> None:
        self.url = absolute(url)
        with _reported(self.url, "be used"):
            self.fs, self.path = locate(self.url)
        self.local = isinstance(self.fs, LocalFileSystem)

    def create(self) -> None:
        """Make the folder, where there are folders. Raises OutputError."""
        self._make_folder(self.path)

    def _make_folder(self, path: str) -> None:
        if not _without_folders(self.fs):
            with _reported(self.url, "be created"):
                self.fs.makedirs(path, exist_ok=True)

    def names(self) -> list[str]:
        """Names of what is in the folder; none when it does not exist, as in an object store."""
        return [name for path in self._listed(self.path) if (name := path.rsplit("/", 1)[-1])]

    def _listed(self, path: str) -> list[str]:
        with _reported(path, "be listed"):
            try:
                return [str(found).rstrip("/") for found in self.fs.ls(path, detail=False)]
            except FileNotFoundError:
                return []

    def inside(self, *parts: str) -> str:
        """The path of something in the folder, for `fs`."""
        return join(self.path, *parts)

    def arrow_filesystem(self) -> Any:
        """The same file system for pyarrow and Ray Data."""
        if self.local:
            return pafs.LocalFileSystem()
        handler = _ObjectStore if _without_folders(self.fs) else pafs.FSSpecHandler
        return pafs.PyFileSystem(handler(self.fs))

    def parquet_files(self, *parts: str) -> list[str]:
        """The Parquet files directly in a folder, sorted; none when it does not exist."""
        return self.files("*.parquet", *parts)

    def files(self, pattern: str, *parts: str) -> list[str]:
        """The files directly in a folder whose names are like `*.json`, sorted."""
        self.fs.invalidate_cache()
        found = self._listed(self.inside(*parts))
        return sorted(p for p in found if fnmatch.fnmatch(p.rsplit("/", 1)[-1], pattern))

    def remove(self, path: str) -> None:
        """Remove a file, which may be gone already. Raises OutputError."""
        with _reported(path, "be removed"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(path)

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
    def reading(self, *folders: str) -> Iterator[None]:
        """When a damaged table is why the body fails, the error is an OutputError that names it.

        Arrow and DuckDB say in many ways what is wrong with a file, and not always with which one:
        after an error that is not one of ours the tables in `folders`, or all that runs read, are
        read to find it.
        """
        try:
            yield
        except (TopiqError, MemoryError):
            raise
        except Exception as error:
            if _lacks_room(error):
                raise OutputError(
                    f"a table to be sorted found too little room in {tempfile.gettempdir()} "
                    f"({str(error).splitlines()[0]}). Free some there, or name a folder with more "
                    "in TMPDIR; the same command goes on from here."
                ) from error
            for path in itertools.chain(*map(self.parquet_files, folders or _TABLES)):
                self._require_whole(path)
            raise

    def _require_whole(self, path: str) -> None:
        try:
            with self.fs.open(path, "rb") as file:
                for _ in pq.ParquetFile(file).iter_batches():
                    pass
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise OutputError(
                f"{self.url}{path.removeprefix(self.path)}: this table cannot be read ({reason}). "
                "If it is damaged, remove it: the command of the run makes again what was in it."
            ) from error

    @contextlib.contextmanager
    def publish(self, *parts: str) -> Iterator[Path]:
        """A local path to write to; what is there at the end replaces the target in one step.

        When the body raises, the target stays as it was and nothing is left behind. Raises
        OutputError when it cannot be written.
        """
        target, shown = self.inside(*parts), join(self.url, *parts)
        self._make_folder(target.rsplit("/", 1)[0])
        partial: Path | None = None
        try:
            folder = Path(target).parent if self.local else None
            handle, name = tempfile.mkstemp(prefix=_PARTIAL, dir=folder)
            os.close(handle)
            partial = Path(name)
            yield partial
            if self.local:
                partial.chmod(0o644)
                _flush(partial)
                partial.replace(target)
            else:
                with _reported(shown, "be written"):
                    self.fs.put_file(str(partial), target)
        except OSError as error:
            if error.errno is None:  # of a library, on what the body read
                raise
            raise _refused(shown, "be written", error) from error
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
        """A small text file, or None when there is none. Raises OutputError."""
        with _reported(join(self.url, *parts), "be read"):
            try:
                return str(self.fs.read_text(self.inside(*parts), encoding="utf-8"))
            except FileNotFoundError:
                return None

    @contextlib.contextmanager
    def parquet_writer(self, schema: pa.Schema, *parts: str) -> Iterator[pq.ParquetWriter]:
        """Write one Parquet file, published in one step when the body ends well."""
        with self.publish(*parts) as path, pq.ParquetWriter(path, schema, compression="zstd") as w:
            yield w


class _ObjectStore(pafs.FSSpecHandler):  # type: ignore[misc]
    """For stores where folders are parts of names: making one would ask for rights on the bucket,
    or make a bucket of a mistyped name.
    """

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: a name needs no folder."""


def _lacks_room(error: Exception) -> bool:
    """Whether DuckDB found no room for what does not fit in its memory."""
    import duckdb

    full = isinstance(error, duckdb.IOException) and "space" in str(error)
    return full or isinstance(error, duckdb.OutOfMemoryException)


def _flush(path: Path) -> None:
    """To the disk itself: a name that outlives a power failure must not outlive its content."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _without_folders(fs: Any) -> bool:
    return bool(schemes(fs) & {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci"})


@contextlib.contextmanager
def _reported(place: str, doing: str) -> Iterator[None]:
    """What the body's store says becomes an OutputError; it may be any kind of exception."""
    try:
        yield
    except (ConfigError, OutputError, MemoryError):
        raise
    except Exception as error:
        raise _refused(place, doing, error) from error


def _refused(place: str, doing: str, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return OutputError(
        f"{place}: cannot {doing} ({reason}). Check the address, the space and the rights there; "
        "the same command goes on from here."
    )
