"""What to score: a file, a folder or prefix, a glob, or a manifest. Lists, never opens media."""

import fnmatch
import hashlib
import itertools
import os
import posixpath
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipeline import schemas, storage
from pipeline.errors import CatalogError
from pipeline.output import database
from pipeline.pairing import Pairing, References
from pipeline.storage import MEDIA_SUFFIXES, Stat
from topiq_core.errors import TopiqError

MANIFEST_SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson")

_REFERENCE = "reference_uri"

COLUMNS = pa.schema(
    [
        ("item_id", pa.string()),
        ("uri", pa.string()),
        ("address", pa.binary()),
        ("reference_uri", pa.string()),
        ("reference_address", pa.binary()),
        ("renditions", pa.int32()),
        ("unpaired", pa.string()),
        ("explicit", pa.bool_()),
        ("size_bytes", pa.int64()),
        ("mtime", pa.float64()),
        ("etag", pa.string()),
    ]
)


@dataclass(frozen=True)
class _Entry:
    address: str
    explicit: bool
    stat: Stat | None = None
    reference: str | None = None


@dataclass
class Catalog:
    """The items found. `table` has the columns of `COLUMNS`, then the manifest's own.

    An item is read from its address; its `uri` is that without credentials and in UTF-8, and goes
    into tables. Addresses are bytes, as file names may be anything.

    An explicit item (named by the user, or with a media file's suffix) is scored or fails; any
    other is looked at, and left out without a word when its content is not media.

    `size_bytes`, `mtime` and `etag` are those of the listing, null where nothing was listed.

    `reference_uri` and `reference_address` are those of the reference, where there is one; for
    full-reference models `renditions` counts the items that share it, and `unpaired` says why there
    is none.
    """

    table: pa.Table
    duplicates: int = 0
    extras: list[pa.Field] = field(default_factory=list)


def item_id(uri: str, reference_uri: str | None = None) -> str:
    """Identifies an item in all tables: hexadecimal, of its URI without credentials.

    An item that is compared is identified with its reference.
    """
    return digest(uri if reference_uri is None else f"{uri}\n{reference_uri}")


def digest(text: str) -> str:
    """24 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def read(source: str) -> Catalog:
    """List the items of a source, sorted by URI for folders, in the order given for manifests.

    Raises CatalogError when there is nothing there or a manifest cannot be used.
    """
    return _without_repeats(_read(source))


def read_pairs(source: str, references: References) -> Catalog:
    """As `read`, each item with its reference; those of one reference stand together.

    The column `reference_uri` of a manifest counts first, then `references`. Raises CatalogError
    when nothing says what the references are.
    """
    found = _read(source)
    table = found.table
    if references.given:
        table = _paired(table, source, references)
    elif not pc.any(pc.is_valid(table["reference_address"])).as_py():
        raise CatalogError(
            f"{source}: the model compares with references, and there are none. Give a manifest "
            "with a column `reference_uri`, or --reference or --reference-root."
        )
    uris, references_ = table["uri"].to_pylist(), table["reference_uri"].to_pylist()
    problems = [
        problem or (None if reference else "its manifest row has no reference_uri")
        for problem, reference in zip(table["unpaired"].to_pylist(), references_, strict=True)
    ]
    table = _with_column(table, "unpaired", problems)
    ids = [item_id(uri, reference or "") for uri, reference in zip(uris, references_, strict=True)]
    table = _with_column(table, "item_id", ids)
    table = table.sort_by([("reference_uri", "ascending"), ("uri", "ascending")])
    out = _without_repeats(Catalog(table, found.duplicates, found.extras))
    shared = Counter(out.table["reference_uri"].to_pylist())
    counts = [shared[reference] for reference in out.table["reference_uri"].to_pylist()]
    return replace(out, table=_with_column(out.table, "renditions", counts))


def _paired(table: pa.Table, source: str, references: References) -> pa.Table:
    """The table with the references that options name, where the manifest names none."""
    uris = table["uri"].to_pylist()
    listed = _read(references.file or references.root or "").table
    known = dict(zip(listed["uri"].to_pylist(), listed["address"].to_pylist(), strict=True))
    if references.file is None:
        pairs = references.pair(uris, list(known), _base(source))
    elif len(known) == 1:
        pairs = [Pairing(uri, reference) for uri in uris for reference in known]
    else:
        raise CatalogError(f"{references.file}: {len(known)} files, but --reference is one.")
    own = zip(
        table["reference_uri"].to_pylist(), table["reference_address"].to_pylist(), strict=True
    )
    columns = ("reference_uri", "reference_address", "unpaired")
    rows = [
        (*given, None) if given[0] else (pair.reference, known.get(pair.reference), pair.problem)
        for given, pair in zip(own, pairs, strict=True)
    ]
    for index, name in enumerate(columns):
        table = _with_column(table, name, [row[index] for row in rows])
    return table


def _base(source: str) -> str:
    """The folder that the paths of a source's items are counted from."""
    source = storage.absolute(source)
    fs, path = storage.locate(source)
    if fs.isfile(path):
        return storage.without_query(source).rpartition("/")[0]
    folder = path if fs.isdir(path) else _MAGIC.split(path)[0].rpartition("/")[0]
    return storage.unstrip(fs, folder)


def _with_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    index = table.column_names.index(name)
    column = pa.array(values, COLUMNS.field(name).type)
    return table.set_column(index, COLUMNS.field(name), column)


def _without_repeats(found: Catalog) -> Catalog:
    """Each item once. Raises CatalogError where two are told apart by a credential alone."""
    first: dict[str, int] = {}
    addresses = found.table["address"].to_pylist()
    for index, name in enumerate(found.table["item_id"].to_pylist()):
        earlier = first.setdefault(name, index)
        one, other = addresses[earlier], addresses[index]
        if one != other and storage.unsigned(from_bytes(one)) != storage.unsigned(
            from_bytes(other)
        ):
            raise CatalogError(
                f"{found.table['uri'][index].as_py()}: two addresses that differ only where this "
                "stands for REDACTED, or in their user. That is taken for a credential, and kept "
                "out of the tables; if it says which item is meant, give it another name than "
                "one of a key, token, password or the like."
            )
    kept = found.table.take(list(first.values()))
    repeats = found.table.num_rows - kept.num_rows
    return Catalog(kept, found.duplicates + repeats, found.extras)


def _read(source: str) -> Catalog:
    source = storage.absolute(source)
    try:
        fs, path = storage.locate(source)
        fs.invalidate_cache()
        if fs.isfile(path):
            suffix = PurePosixPath(storage.without_query(path)).suffix.lower()
            if suffix in MANIFEST_SUFFIXES:
                return _manifest(source, fs, path, suffix)
            return Catalog(_items([_Entry(source, True)]))
        if fs.isdir(path):
            return _listing(source, fs, _below(fs, [path]), "no files in this folder.")
        if _MAGIC.search(path):
            return _listing(source, fs, _glob(fs, path), "nothing matches.")
    except (TopiqError, MemoryError):
        raise
    except Exception as error:  # stores have exceptions of their own
        reason = str(error) or type(error).__name__
        raise CatalogError(
            f"{source}: cannot be read ({reason}). Check the address and the rights there."
        ) from error
    raise CatalogError(f"{source}: no such file, folder, glob or manifest.")


def _listing(source: str, fs: Any, items: Iterable[_Entry], nothing: str) -> Catalog:
    found = {entry.address: entry for entry in items}  # a glob may lead to one file in two ways
    if not found:
        raise CatalogError(f"{source}: {nothing}")
    addresses = sorted(found)
    if not storage.leads_back(fs, addresses[0]):
        raise CatalogError(
            f"{source}: folders cannot be listed there, since what is in them has no address of "
            f"its own ({addresses[0]} names no file). Give a manifest with whole addresses, or "
            "copy the files."
        )
    return Catalog(_items([found[address] for address in addresses]))


def _items(entries: list[_Entry]) -> pa.Table:
    stats = [entry.stat or Stat(None, None, None) for entry in entries]
    uris = [storage.redacted(entry.address) for entry in entries]
    references = [entry.reference for entry in entries]
    columns = {
        "item_id": [item_id(uri) for uri in uris],
        "uri": uris,
        "address": [to_bytes(entry.address) for entry in entries],
        "reference_uri": [r and storage.redacted(r) for r in references],
        "reference_address": [r and to_bytes(r) for r in references],
        "renditions": [None] * len(entries),
        "unpaired": [None] * len(entries),
        "explicit": [entry.explicit for entry in entries],
        "size_bytes": [stat.size_bytes for stat in stats],
        "mtime": [stat.mtime for stat in stats],
        "etag": [stat.etag for stat in stats],
    }
    return pa.table(columns, schema=COLUMNS)


def to_bytes(address: str) -> bytes:
    """An address as it stands in the table of a catalog."""
    return address.encode("utf-8", "surrogateescape")


def from_bytes(address: bytes) -> str:
    """An address from the table of a catalog."""
    return address.decode("utf-8", "surrogateescape")


def _below(fs: Any, folders: Iterable[str]) -> Iterator[_Entry]:
    """All files below folders, but for hidden ones (.DS_Store, ._copy.mp4, .git)."""
    if _lists_flat(fs):
        for folder in folders:
            yield from _keys_below(fs, folder)
        return
    for _, entries in _walk(fs, folders):
        for name, info in entries:
            if not name.startswith(".") and _is_file(fs, info):
                yield _entry(fs, info["name"], info)


def _lists_flat(fs: Any) -> bool:
    """Whether a store lists all keys with a prefix at once, in pages of a thousand.

    Folder by folder, each would be a request, and a folder without a name (`a//b.mp4`) be missed.
    """
    return "s3" in storage.schemes(fs)


def _keys_below(fs: Any, folder: str) -> Iterator[_Entry]:
    try:
        with _listed(fs, folder):
            found = fs.find(folder, detail=True)
    except FileNotFoundError:
        return
    for path, info in found.items():
        parts = path.removeprefix(folder.rstrip("/") + "/").split("/")
        if parts[-1] and not any(part.startswith(".") for part in parts) and _is_file(fs, info):
            yield _entry(fs, path, info)


def _glob(fs: Any, path: str) -> Iterator[_Entry]:
    """What matches, and all files below matching folders.

    What is hidden matches only parts of the pattern that begin with a dot.
    """
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    places: Iterable[_Place] = [("/".join(parts[:first]) or fs.root_marker, None)]
    if parts[-1] == "**":
        parts.append("*")
    for part in parts[first:-1]:
        places = _matching_folders(fs, places, part)
    folders = []
    for info in _matching(fs, places, parts[-1]):
        if _is_folder(fs, info):
            folders.append(info["name"].rstrip("/"))
        elif _is_file(fs, info):
            yield _entry(fs, info["name"], info)
    if parts[-2:] != ["**", "*"]:  # which matches all files below as well
        yield from _below(fs, folders)


_MAGIC = re.compile(r"[*?\[]")
# Names of what is in a folder, and what the file system tells of each. In an object store a name
# may be of an object and of a folder.
_Entries = list[tuple[str, dict[str, Any]]]
# A folder, with what is in it where that is known.
_Place = tuple[str, _Entries | None]


def _matching_folders(fs: Any, places: Iterable[_Place], part: str) -> Iterable[_Place]:
    """The folders that a part of a pattern matches in others; `**` is any number of levels."""
    if part == "**":
        return _walk(fs, [folder for folder, _ in places])
    matching = _matching(fs, places, part)
    return ((info["name"].rstrip("/"), None) for info in matching if _is_folder(fs, info))


def _matching(fs: Any, places: Iterable[_Place], part: str) -> Iterator[dict[str, Any]]:
    """What a part of a pattern matches in folders."""
    for folder, entries in places:
        for name, info in entries or _children(fs, folder):
            hidden = name.startswith(".") and not part.startswith(".")
            if not hidden and fnmatch.fnmatchcase(name, part):
                yield info


def _walk(fs: Any, folders: Iterable[str]) -> Iterator[tuple[str, _Entries]]:
    """Folders and all that are below them and not hidden, each once, with what is in it.

    Links to folders are followed after all else: what lies in the tree itself keeps its own path,
    and links that lead around in a circle end. Not as fsspec's own walk, which follows none and
    leaves out what it cannot list. Raises CatalogError.
    """
    waiting, links, seen = deque[str](), deque[str](), set[str]()

    def wait(folder: str) -> None:
        (links if _is_link(fs, folder) else waiting).append(folder)

    for folder in folders:
        wait(folder)
    while waiting or links:
        folder = (waiting or links).popleft()
        real = os.path.realpath(folder) if isinstance(fs, LocalFileSystem) else folder
        if real in seen:
            continue
        seen.add(real)
        entries = _children(fs, folder)
        yield folder, entries
        for name, info in entries:
            if not name.startswith(".") and _is_folder(fs, info):
                wait(info["name"].rstrip("/"))


def _children(fs: Any, folder: str) -> _Entries:
    """What is in a folder; nothing when there is no such folder (any more). Raises CatalogError."""
    try:
        with _listed(fs, folder):
            listing = fs.ls(folder, detail=True)
    except FileNotFoundError:
        return []
    own = folder.rstrip("/")  # some list the folder itself, and a file as what is in it
    paths = ((info["name"].rstrip("/"), info) for info in listing)
    return sorted(
        ((path.rpartition("/")[2], info) for path, info in paths if path != own),
        key=lambda entry: entry[0],
    )


@contextmanager
def _listed(fs: Any, folder: str) -> Iterator[None]:
    """What a store says of a folder, but that there is none, becomes a CatalogError."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # stores have exceptions of their own
        reason = str(error) or type(error).__name__
        raise CatalogError(
            f"{storage.unstrip(fs, folder)}: this folder cannot be listed ({reason}), and what is "
            "in it would be missing. Check the rights there; if the store was busy, try again."
        ) from error


def _is_link(fs: Any, folder: str) -> bool:
    return isinstance(fs, LocalFileSystem) and Path(folder).is_symlink()


def _is_folder(fs: Any, info: dict[str, Any]) -> bool:
    """Also what is a link to one."""
    return info["type"] == "directory" or bool(info.get("islink") and fs.isdir(info["name"]))


def _is_file(fs: Any, info: dict[str, Any]) -> bool:
    """Pipes, sockets and devices are not media, and reading one may never end."""
    if info.get("islink"):
        return bool(fs.isfile(info["name"]))
    return info["type"] not in ("directory", "other")


def _entry(fs: Any, path: str, info: dict[str, Any]) -> _Entry:
    explicit = PurePosixPath(path).suffix.lower() in MEDIA_SUFFIXES
    # A link is listed with its own size and time.
    stat = None if info.get("islink") else storage.stat_from_info(info)
    return _Entry(storage.unstrip(fs, path), explicit, stat)


def _manifest(source: str, fs: Any, path: str, suffix: str) -> Catalog:
    """A table with a `uri` column, and perhaps `reference_uri`.

    Relative paths are relative to the manifest.
    """
    try:
        with fs.open(path, "rb") as file:
            table = _read_table(file, suffix)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise CatalogError(f"{source}: not a readable manifest ({error}).") from error
    if "uri" not in table.column_names:
        raise CatalogError(
            f"{source}: a manifest needs a column `uri`; it has {', '.join(table.column_names)}."
        )
    if table.num_rows == 0:
        raise CatalogError(f"{source}: the manifest is empty.")
    base = storage.without_query(source).rsplit("/", 1)[0]
    given = table["uri"].cast(pa.string()).to_pylist()
    uris = []
    for number, uri in enumerate(given, start=1):
        if not uri:
            raise CatalogError(f"{source}: row {number} has no uri.")
        uris.append(_resolved(uri, base))
    references: list[str | None] = [None] * len(uris)
    if _REFERENCE in table.column_names:
        column = table[_REFERENCE].cast(pa.string()).to_pylist()
        references = [_resolved(uri, base) if uri else None for uri in column]
        table = table.drop_columns([_REFERENCE])
    entries = zip(uris, references, strict=True)
    out = _items([_Entry(uri, True, reference=reference) for uri, reference in entries])
    extras = table.drop_columns(["uri"]).rename_columns(_extra_names(table.column_names))
    fields = []
    for name in extras.column_names:
        column = _carried(source, name, extras[name])
        fields.append(pa.field(name, column.type))
        out = out.append_column(fields[-1], column)
    return Catalog(out, extras=fields)


def _carried(source: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A manifest's column in a type that goes through DuckDB to the scores, and back.

    Half precision becomes single, also in lists, and dictionaries become their values. Raises
    CatalogError for a type that does not pass.
    """
    kind = column.type
    try:
        column = column.cast(_passing(kind))
        connection = database()
        connection.register("one", pa.table({"it": column.drop_null().slice(0, 1)}))
        back = connection.sql("SELECT it FROM one").to_arrow_table()
        back["it"].cast(column.type)
    except Exception as error:
        raise CatalogError(
            f"{source}: column {name} is of type {kind}, which cannot be carried along "
            f"({str(error).splitlines()[0]}). Cast it, or leave it out."
        ) from error
    return column


def _passing(kind: pa.DataType) -> pa.DataType:
    """The type itself, or the one that it is carried in."""
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_dictionary(kind):
        return _passing(kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_passing(kind.value_type), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(_passing(kind.value_type))
    if pa.types.is_list(kind):
        return pa.list_(_passing(kind.value_type))
    return kind


# A row must fit in a block. Small files take no more memory for a large one.
_BLOCK_BYTES = 256 << 20


def _read_table(file: Any, suffix: str) -> pa.Table:
    if suffix == ".parquet":
        return pq.read_table(file)
    if suffix == ".csv":
        return _read_csv(file)
    return pajson.read_json(file, pajson.ReadOptions(block_size=_BLOCK_BYTES))


def _read_csv(file: Any) -> pa.Table:
    """A CSV with its types guessed, but for names that look like numbers: `007` stays text.

    So does a column in which nothing stands.
    """
    data = file.read()
    read = pacsv.ReadOptions(block_size=_BLOCK_BYTES)
    parse = pacsv.ParseOptions(newlines_in_values=True)
    guessed = pacsv.read_csv(pa.BufferReader(data), read, parse)
    doubtful = [
        field.name
        for field in guessed.schema
        if pa.types.is_integer(field.type)
        or pa.types.is_floating(field.type)
        or pa.types.is_null(field.type)
    ]
    if not doubtful or len(set(guessed.column_names)) < guessed.num_columns:
        return guessed
    convert = pacsv.ConvertOptions(
        include_columns=doubtful,
        column_types=dict.fromkeys(doubtful, pa.string()),
        strings_can_be_null=True,
    )
    texts = pacsv.read_csv(pa.BufferReader(data), read, parse, convert)
    for name in doubtful:
        index, text = guessed.column_names.index(name), texts[name]
        is_name = pc.any(pc.match_substring_regex(text, _NAME_OF_DIGITS)).as_py()
        if is_name or pa.types.is_null(guessed.schema.field(name).type):
            guessed = guessed.set_column(index, name, text)
    return guessed


# Leading zeros, a plus, or more digits than an integer has.
_NAME_OF_DIGITS = r"^\s*(?:-?0\d|\+|-?\d{19})"


def _resolved(uri: str, base: str) -> str:
    """An absolute address: paths without a scheme are relative to the manifest's folder."""
    if "://" in uri and not uri.startswith("file://"):
        return uri
    local = uri.removeprefix("file://")
    if local.startswith("/"):
        return local
    return f"{base}/{local}" if "://" in base else posixpath.normpath(f"{base}/{local}")


def _extra_names(names: list[str]) -> list[str]:
    """The manifest's columns under names that no column of ours has.

    One without a name, as pandas writes its index, becomes `unnamed`: SQL cannot say "".
    """
    taken = set(COLUMNS.names) | {f"known_{name}" for name in schemas.STATS}
    given = {name.lower() for name in names}
    out = []
    for name in names:
        if name == "uri":
            continue
        other = f"manifest_{name}" if name else "unnamed"
        candidates = itertools.chain(
            (name or other, other), (f"{other}_{i}" for i in itertools.count(2))
        )
        # Without case: to DuckDB and most SQL engines Score and score are one column.
        used = taken if name else taken | given
        chosen = next(c for c in candidates if c.lower() not in used and not schemas.is_reserved(c))
        taken.add(chosen.lower())
        out.append(chosen)
    return out
