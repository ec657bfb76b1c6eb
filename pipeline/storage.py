"""Files and objects by URL, local or remote, through fsspec.

Every decoder process imports this: nothing large belongs here, as Arrow or DuckDB.
"""

import contextlib
import errno
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, TypeGuard, cast
from urllib.parse import unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import (
    AccessDenied,
    ConfigError,
    MediaError,
    NotFound,
    StorageError,
    Throttled,
)

# fmt: off
MEDIA_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".avif", ".gif",
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".f4v", ".ts", ".m2ts", ".mts",
    ".mpg", ".mpeg", ".vob", ".3gp", ".3g2", ".mxf", ".wmv", ".asf", ".ogv", ".y4m", ".ivf",
    ".h264", ".264", ".h265", ".265", ".hevc", ".obu",
)
# fmt: on

# The largest remote object that is fetched whole.
WHOLE_FETCH_BYTES = 64 << 20
# How many bytes come in the time that one more request takes (30 ms at 1 Gb/s and more).
REQUEST_BYTES = 4 << 20
# What is read ahead in a remote object: at first, for headers; and at least and most later on.
HEADER_BYTES = 1 << 20
READ_AHEAD_BYTES = (256 << 10, 8 << 20)


@dataclass(frozen=True)
class Stat:
    """What tells whether an object has changed. `mtime` in seconds; absent parts are None."""

    size_bytes: int | None
    mtime: float | None
    etag: str | None


_USER = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]*)://(?P<user>[^\s/?#@]*@)")
_PARAMETER = re.compile(r"(?P<name>[?&;][^=&;\s]+)=(?P<value>[^&;\s'\"<>)]*)")
# Other schemes have no parameters: an object's key may hold any of these characters.
_HAS_PARAMETERS = re.compile(r"https?://", re.IGNORECASE)
# Here the user's place is that of the container: abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/.
_WITH_CONTAINER = {"abfs", "abfss", "wasb", "wasbs"}
# Of addresses that are signed for a time: S3, Google, Aliyun, Tencent, CloudFront, Azure, Akamai.
_SIGNING = re.compile(
    r"x-(?:amz|goog|oss|cos|ms)-.*|signature|sig|token|security-token|key-pair-id"
    r"|(?:aws|oss)?accesskeyid|googleaccessid|hdn[a-z]*",
    re.IGNORECASE,
)
# What the signature is for and when it ends. By themselves they may say which item is meant.
_SIGNED = re.compile(r"policy|expires", re.IGNORECASE)
_SIGNED_BY_AZURE = re.compile(r"s[eprtv]|spr|sip|sk(?:oid|tid|[tesv])", re.IGNORECASE)
# Anywhere in a name; or as a whole word of it: `api_key` and `userAuth`, not `keyframe`, `author`.
_SECRET = re.compile(
    r"secret|passw|passphrase|credential|token|signature|oauth|(?:api|access|private|auth)key"
    r"|(?:^|[-_.])(?:pwd|key|hmac|auth|authorization|jwt|sig)(?:[-_.]|$)",
    re.IGNORECASE,
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# A store that takes an object's key as a parameter: that is no secret, if it names a file.
_OBJECT_KEY = re.compile(r"(?:(?:file|object|blob|s3|image|video|media)[-_.]?)?key", re.IGNORECASE)


def redacted(text: str) -> str:
    """A text with the credentials in its URLs taken out: of users, and of signed addresses.

    What is left of an address is the same however often it is signed anew. Text without URLs is
    returned as it is, but for bytes of file names that are not UTF-8: they are escaped, since
    neither Parquet nor a terminal can take them.
    """
    if "://" in text:
        text = _USER.sub(_without_user, text)
    if _HAS_PARAMETERS.search(text):
        signing = _signing(text)

        def clean(parameter: re.Match[str]) -> str:
            name, secret = parameter["name"], signing(parameter) or _is_secret(parameter)
            return f"{name}=REDACTED" if secret else parameter[0]

        text = _PARAMETER.sub(clean, text)
    return text.encode("utf-8", "backslashreplace").decode()


def unsigned(address: str) -> str:
    """An address without what signs it for a time: the same for the same object."""
    if not _HAS_PARAMETERS.search(address):
        return address
    signing = _signing(address)
    return _PARAMETER.sub(lambda found: "" if signing(found) else found[0], address)


def _without_user(match: re.Match[str]) -> str:
    if match["scheme"].lower() in _WITH_CONTAINER and ":" not in match["user"]:
        return match[0]
    return f"{match['scheme']}://"


def _signing(text: str) -> Callable[[re.Match[str]], bool]:
    """Whether a parameter is part of what signs an address, told by all that a text has."""
    parameters = list(_PARAMETER.finditer(text))
    patterns = [_SIGNING]
    if any(_SIGNING.fullmatch(p["name"][1:]) or _is_secret(p) for p in parameters):
        patterns.append(_SIGNED)
    if any(p["name"][1:].lower() == "sig" for p in parameters):
        patterns.append(_SIGNED_BY_AZURE)
    return lambda found: any(pattern.fullmatch(found["name"][1:]) for pattern in patterns)


def _is_secret(parameter: re.Match[str]) -> bool:
    name = _HUMP.sub("_", unquote(parameter["name"][1:]))
    names_a_file = parameter["value"].lower().endswith(MEDIA_SUFFIXES)
    if names_a_file and _OBJECT_KEY.fullmatch(name):
        return False
    return bool(_SECRET.search(name))


def locate(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL or local path, and the path inside it.

    Raises ConfigError for a scheme that is unknown, or whose package is not installed.
    """
    if "://" not in url:  # also with a `::`, which chains URLs
        return LocalFileSystem(), str(LocalFileSystem._strip_protocol(url))
    try:
        fs, path = _opened(url)
    except ImportError as error:
        extra = _EXTRAS.get(url.split("://")[0])
        what = f"Install it: pip install -e '.[{extra}]'" if extra else str(error).rstrip(".")
        raise ConfigError(f"{url}: what reads this is not installed. {what}.") from error
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        raise ConfigError(
            f"{url}: no store is known by this scheme ({error}). Check the address."
        ) from error
    return fs, str(path)


def _opened(url: str) -> tuple[Any, Any]:
    """As fsspec does, but for keys of objects in which a `::` stands that chains no URLs."""
    scheme, _, rest = url.partition("://")
    if "::" not in rest or "://" in rest or scheme not in _STORES:
        return cast(tuple[Any, Any], fsspec.core.url_to_fs(url))
    kind: Any = fsspec.get_filesystem_class(scheme)
    return kind(**kind._get_kwargs_from_urls(url)), kind._strip_protocol(url)


# Schemes of what holds objects or files itself, unlike `zip` and `simplecache`.
_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https"}
# Which extra of ours installs what reads a scheme.
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}


def without_query(address: str) -> str:
    """An address without its parameters, of those that have any."""
    return address.partition("?")[0] if _HAS_PARAMETERS.match(address) else address


def schemes(fs: Any) -> set[str]:
    """The schemes of a file system's addresses; many have more than one name."""
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


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


def leads_back(fs: Any, address: str) -> bool:
    """Whether an address that `unstrip` gave can be read by itself.

    It cannot where the server or the archive is no part of paths, as with ftp:// and zip://.
    """
    if (host := getattr(fs, "host", None)) and str(host) not in address:
        return False
    try:
        again, path = locate(address)
        return bool(again == fs or again.exists(path))
    except Exception:  # of any kind, from a file system that is opened with too little
        return False


def stat_from_info(info: dict[str, Any]) -> Stat:
    """Size, time and etag from an fsspec listing entry."""
    modified = next(
        (info[k] for k in ("mtime", "LastModified", "last_modified") if k in info), None
    )
    if isinstance(modified, datetime):
        modified = modified.timestamp()
    mtime = float(modified) if isinstance(modified, int | float) else None
    etag = info.get("ETag") or info.get("etag")
    if not etag and (said := info.get("Last-Modified")):  # of a web server
        with contextlib.suppress(ValueError):
            mtime = parsedate_to_datetime(said).timestamp()
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
        elif (size := fs.size(path)) is None:
            source = io.BytesIO(_of_unknown_size(fs, path, url))
        elif size <= most:
            source = io.BytesIO(fs.cat_file(path))
        else:
            ranges = fs.open(path, "rb", block_size=HEADER_BYTES, cache_type="readahead")
            source = cast(IO[bytes], _Ranged(ranges, url))
    try:
        yield source
    finally:
        if not isinstance(source, str):
            source.close()


def _of_unknown_size(fs: Any, path: str, url: str) -> bytes:
    """The whole object, of a server that does not say how long it is and sends no ranges."""
    data = bytearray()
    with fs.open(path, "rb") as stream:
        while part := stream.read(HEADER_BYTES):  # or less: what has come so far
            data += part
            if len(data) > WHOLE_FETCH_BYTES:
                raise StorageError(
                    f"{url}: the server does not say how large it is, and it is larger than the "
                    f"{WHOLE_FETCH_BYTES >> 20} MiB that are fetched then. Serve it with "
                    "Content-Length."
                )
    return bytes(data)


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


class _Ranged:
    """A remote file read in ranges: what the store answers then becomes a MediaError too."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def read(self, count: int = -1) -> bytes:
        with _media_errors(self._url):
            return bytes(self._file.read(count))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def _media_errors(url: str) -> Iterator[None]:
    try:
        yield
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # stores have exceptions of their own, many without a common base
        raise _media_error(url, error) from error


def _media_error(url: str, error: Exception) -> MediaError:
    told: BaseException = error
    if isinstance(error, FileNotFoundError) and _is_of_http(error.__cause__):
        told = error.__cause__  # fsspec says of all that a web server answers that nothing is there
    status = getattr(told, "status", None)
    if isinstance(told, FileNotFoundError) or status in (404, 410):
        return NotFound(f"{url}: no such file or object.")
    if isinstance(told, PermissionError) or status in (401, 403):
        return AccessDenied(f"{url}: reading is not permitted. Check its access rights.")
    if isinstance(told, ConfigError):
        return StorageError(str(told))
    reason = str(told) or type(told).__name__
    # s3fs reports SlowDown, ServiceUnavailable and their like as EBUSY.
    if getattr(told, "errno", None) == errno.EBUSY or status in (429, 503):
        return Throttled(f"{url}: the store is too busy ({reason}).")
    return StorageError(f"{url}: cannot be read ({reason}).")


def _is_of_http(cause: BaseException | None) -> TypeGuard[BaseException]:
    return isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp.")
