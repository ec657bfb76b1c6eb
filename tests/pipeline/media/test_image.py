from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DecodeError, TooLarge
from pipeline.media import image
from pipeline.media.probe import kind_of

PIXELS = 10**8


def decode(path, background="black"):
    return image.decode(str(path), PIXELS, background)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_lossless_formats_come_out_as_they_went_in(tmp_path, picture, suffix):
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(picture).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(decode(path), picture)


@pytest.mark.parametrize("suffix", ["jpg", "avif"])
def test_lossy_formats_come_out_nearly_so(tmp_path, picture, suffix):
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(picture).save(path, quality=95)
    assert np.abs(decode(path).astype(int) - picture).mean() < 4


def test_the_name_does_not_matter(tmp_path, picture):
    path = tmp_path / "photo.dat"
    Image.fromarray(picture).save(path, format="PNG")
    assert kind_of(path.read_bytes()[:4096]) == "image"
    assert np.array_equal(decode(path), picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, picture, orientation):
    turned = Image.fromarray(picture)
    exif = turned.getexif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    turned.save(path, exif=exif)
    upright = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, -1),
        7: np.rot90(picture, 2).transpose(1, 0, 2),
        8: np.rot90(picture, 1),
    }[orientation]
    assert np.array_equal(decode(path), upright)


@pytest.mark.parametrize(("background", "level"), [("black", 0), ("white", 255)])
def test_transparency_is_laid_over_the_background(tmp_path, background, level):
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[:, :20] = (200, 100, 50, 255)
    path = tmp_path / "layer.png"
    Image.fromarray(pixels).save(path)
    rgb = decode(path, background)
    assert (rgb[:, :20] == (200, 100, 50)).all()
    assert (rgb[:, 20:] == level).all()


def test_grey_and_palette_become_rgb(tmp_path, picture):
    grey = Image.fromarray(picture).convert("L")
    grey.save(tmp_path / "grey.png")
    assert np.array_equal(decode(tmp_path / "grey.png")[..., 1], np.asarray(grey))
    Image.fromarray(picture).convert("P").save(tmp_path / "palette.png")
    assert decode(tmp_path / "palette.png").shape == picture.shape


def write_deep(path, pixels, codec, pix_fmt):
    context = av.CodecContext.create(codec, "w")
    context.height, context.width = pixels.shape[:2]
    context.pix_fmt, context.time_base = pix_fmt, Fraction(1, 25)
    source = "rgb48le" if pixels.ndim == 3 else "gray16le"
    frame = av.VideoFrame.from_ndarray(pixels, format=source).reformat(format=pix_fmt)
    packets = context.encode(frame) + context.encode(None)
    path.write_bytes(b"".join(bytes(p) for p in packets))


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.png", "png", "rgb48be"), ("a.tiff", "tiff", "rgb48le"), ("a.png", "png", "gray16be")],
)
def test_sixteen_bits_are_scaled_not_cut(tmp_path, name, codec, pix_fmt):
    shape = (64, 64) if pix_fmt.startswith("gray") else (64, 64, 3)
    deep = np.random.default_rng(0).integers(0, 65536, shape).astype(np.uint16)
    write_deep(tmp_path / name, deep, codec, pix_fmt)
    want = np.rint(deep.astype(np.float64) / 257)
    want = want if want.ndim == 3 else np.repeat(want[..., None], 3, axis=2)
    assert np.array_equal(decode(tmp_path / name), want.astype(np.uint8))


def test_a_truncated_image_is_an_error_not_a_grey_half(tmp_path, picture):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(picture).save(whole, quality=95)
    path = tmp_path / "cut.jpg"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(DecodeError, match="cut.jpg"):
        decode(path)


def test_a_hundred_megapixels_are_refused_from_the_header_alone(tmp_path):
    path = tmp_path / "huge.png"
    Image.new("1", (12_000, 9_000)).save(path)
    with pytest.raises(TooLarge, match="12000x9000"):
        image.decode(str(path), 40_000_000, "black")
    with pytest.raises(TooLarge, match="huge.png"):
        image.facts(str(path), 40_000_000)


@pytest.mark.parametrize(
    "options", [{}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}]
)
def test_the_size_of_a_webp_is_known_before_it_is_opened(tmp_path, picture, options):
    """Plain, lossless and extended files hold it in different places."""
    path = tmp_path / "a.webp"
    Image.fromarray(picture).save(path, **options)
    with pytest.raises(TooLarge, match=f"{picture.shape[1]}x{picture.shape[0]}"):
        image.facts(str(path), picture.shape[0] * picture.shape[1] - 1)
    assert image.facts(str(path), picture.size).width == picture.shape[1]
