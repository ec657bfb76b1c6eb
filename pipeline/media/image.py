"""Decode a still image to upright, full-range RGB."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from pipeline import storage
from pipeline.errors import DecodeError, TooLarge, UnsupportedCodec
from pipeline.media.colour import RGB, Background

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF")
"""What Pillow may try to open; anything else is not an image to us."""


@dataclass(frozen=True)
class ImageFacts:
    """What the header says. Width and height are those of the picture before it is turned."""

    format: str
    mode: str
    width: int
    height: int
    bits: int


def sniff(head: bytes) -> bool:
    """Whether the first bytes are those of an image format, be it one that is turned away."""
    if head[:3] == b"\xff\xd8\xff" or head[:8] == b"\x89PNG\r\n\x1a\n":
        return True
    if head[:4] in _TIFF_MAGIC:
        return True
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return True
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return True
    return _is_avif(head) or _is_heif(head) or _is_cr3(head)


def facts(url: str, max_pixels: int) -> ImageFacts:
    """Read the header of an image. Raises MediaError."""
    with storage.open_media(url) as source, _opened(url, source, max_pixels) as image:
        width, height = image.size
        return ImageFacts(str(image.format), image.mode, width, height, _bits(image))


def decode(url: str, max_pixels: int, background: Background) -> RGB:
    """The first picture of an image file as uint8 RGB [H,W,3].

    EXIF orientation is applied, transparency is laid over `background`, grey becomes RGB, and
    16 bits are scaled to 8 by value/257. Raises MediaError.
    """
    with storage.open_media(url) as source, _opened(url, source, max_pixels) as image:
        try:
            if _bits(image) > 8 and image.format in ("PNG", "TIFF"):
                return _decode_deep(url, source, image, background)
            upright = ImageOps.exif_transpose(image)
            return _flatten(upright, background)
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise DecodeError(f"{url}: damaged or incomplete image ({error}).") from error


# Major brands of ISO/IEC 23008-12: stills and sequences in HEVC, L-HEVC and AVC, and of any coding.
# A video that holds a picture too, such as its cover, has them among its compatible brands only.
_HEIF_BRANDS = (
    b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"avci", b"avcs",
    b"mif1", b"mif2", b"msf1",
)  # fmt: skip
_HEAD_BYTES = 64
_EXIF_ORIENTATION = 0x0112
_TIFF_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_TIFF_NEW_SUBFILE_TYPE, _TIFF_REDUCED = 254, 1
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_TILE_WIDTH = 322
_DNG_VERSION = 50706
_DEEP_OPTIONS = {"format_whitelist": "png_pipe,tiff_pipe", "protocol_whitelist": "file"}


class _opened:
    """Pillow's image, with its errors turned into ours and the pixel limit set."""

    def __init__(self, url: str, source: Any, max_pixels: int) -> None:
        self.url, self.source, self.max_pixels = url, source, max_pixels

    def __enter__(self) -> Image.Image:
        try:
            with _rewound(self.source) as file:
                head = file.read(_HEAD_BYTES)
                if objection := _objection(head, file):
                    raise UnsupportedCodec(f"{self.url}: {objection}")
            self._check(*_webp_size(head))  # Pillow allocates a WebP as it opens it
            # The limit is checked below, before any pixel is decoded; Pillow's own would warn.
            Image.MAX_IMAGE_PIXELS = None
            self.image = Image.open(self.source, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise DecodeError(f"{self.url}: damaged image, its header is unreadable.") from error
        except (OSError, SyntaxError, ValueError, OverflowError) as error:
            raise DecodeError(f"{self.url}: damaged image ({error}).") from error
        try:
            self._check(*self.image.size)
        except TooLarge:
            self.image.close()
            raise
        return self.image

    def _check(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise TooLarge(
                f"{self.url}: {width}x{height} pixels, over the limit of {self.max_pixels}. "
                "Raise max_pixels if there is memory for it."
            )

    def __exit__(self, *_: object) -> None:
        self.image.close()


@contextlib.contextmanager
def _rewound(source: str | IO[bytes]) -> Iterator[IO[bytes]]:
    """The file of a path, or the one given, which is at its start again afterwards."""
    if isinstance(source, str):
        with Path(source).open("rb") as file:
            yield file
    else:
        yield source
        source.seek(0)


def _is_avif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and any(b in head[8:64] for b in (b"avif", b"avis"))


def _is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and not _is_avif(head)


def _is_cr3(head: bytes) -> bool:
    return head[4:12] == b"ftypcrx "


def _objection(head: bytes, file: IO[bytes]) -> str | None:
    """Why an image is turned away, although something in it could be read; None when it is not."""
    if _is_heif(head):
        return "HEIC (HEIF) is not read here. Convert it to JPEG, PNG or AVIF."
    if _is_cr3(head) or (head[:4] in _TIFF_MAGIC and _holds_a_preview(head, file)):
        return (
            "camera RAW, in which only a preview could be read. Develop it first, to TIFF or PNG."
        )
    return None


def _holds_a_preview(head: bytes, file: IO[bytes]) -> bool:
    """Whether the first picture of a TIFF is a reduced one, as in DNG, NEF, ARW and CR2."""
    if head[8:11] == b"CR\x02":
        return True
    if len(head) < _HEAD_BYTES:
        return False
    is_big = head[2] == 43
    first = TiffImagePlugin.ImageFileDirectory_v2(head[: 16 if is_big else 8])
    file.seek(first.next)
    first.load(file)
    subfile = first.get(_TIFF_NEW_SUBFILE_TYPE)
    return _DNG_VERSION in first or (isinstance(subfile, int) and bool(subfile & _TIFF_REDUCED))


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height in the header of a WebP file (RFC 9649, section 2); zeros of any other."""
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0, 0
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        sides = int.from_bytes(head[21:25], "little")
        return 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    sides = int.from_bytes(head[26:30], "little")
    return sides & 0x3FFF, sides >> 16 & 0x3FFF


def _bits(image: Image.Image) -> int:
    """Bits per channel, from the header: Pillow's mode hides them for 16-bit colour."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return 16
    if image.mode == "F":
        return 32
    if image.format == "PNG":
        return _png_bits(image)
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS_PER_SAMPLE, 8)
        return int(bits[0] if isinstance(bits, tuple) else bits)
    return 8


def _png_bits(image: Image.Image) -> int:
    file = getattr(image, "fp", None)
    if file is None:
        return 8
    position = file.tell()
    file.seek(24)
    bits = file.read(1)
    file.seek(position)
    return bits[0] if bits else 8


def _flatten(image: Image.Image, background: Background) -> RGB:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        backdrop = Image.new("RGBA", layer.size, background)
        image = Image.alpha_composite(backdrop, layer)
    return np.asarray(image.convert("RGB"))


def _decode_deep(url: str, source: Any, image: Image.Image, background: Background) -> RGB:
    """16-bit PNG and TIFF: Pillow would cut them to 8 bits, or refuse; FFmpeg reads them whole.

    Whether they are whole is Pillow's to say: where a strip of a TIFF is damaged, FFmpeg leaves the
    rest of it blank, and told to be strict it also turns away every tag that it does not know.
    Raises OSError, SyntaxError or ValueError for damage, else UnsupportedCodec.
    """
    unsupported = UnsupportedCodec(
        f"{url}: no decoder for this {_bits(image)}-bit image. Save it as a PNG of 16 bits."
    )
    if _TIFF_TILE_WIDTH in getattr(image, "tag_v2", {}):  # FFmpeg takes such a picture for black
        raise unsupported
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    image.load()
    # From memory: by its name, FFmpeg could take a file for a pattern of a sequence of files.
    if isinstance(source, str):
        data = Path(source).read_bytes()
    else:
        source.seek(0)
        data = source.read()
    try:
        with av.open(io.BytesIO(data), container_options=_DEEP_OPTIONS) as container:
            container.streams.video[0].codec_context.thread_count = 1
            frame = next(container.decode(video=0))
            deep = frame.reformat(format="rgba64le").to_ndarray()
    except (av.error.FFmpegError, StopIteration, ValueError) as error:
        raise unsupported from error
    return _upright(_over(deep, background), orientation)


def _over(deep: npt.NDArray[np.uint16], background: Background) -> RGB:
    """16-bit RGBA over a background, to 8 bits: round(value / 257). By rows, to save memory."""
    back = 0.0 if background == "black" else 65535.0
    out = np.empty((*deep.shape[:2], 3), np.uint8)
    for row, line in enumerate(deep):
        alpha = line[:, 3:].astype(np.float64) / 65535
        out[row] = np.rint((line[:, :3] * alpha + back * (1 - alpha)) / 257)
    return out


def _upright(rgb: RGB, orientation: int) -> RGB:
    """Apply an EXIF orientation (Exif 2.32, tag 0x0112)."""
    turned = Image.fromarray(rgb)
    turned.getexif()[_EXIF_ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(turned))
