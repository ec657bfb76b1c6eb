import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from jobs.sample_media import encode
from pipeline.errors import DecodeError, TooLarge, UnsupportedCodec
from pipeline.media import image
from pipeline.media.probe import kind_of, probe
from pipeline.media.sample import SampleSpec

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


def smooth_16_bits(height, width):
    """A picture that compresses, but not to nothing."""
    steps = np.random.default_rng(0).integers(-300, 301, (height, width))
    return (np.cumsum(steps, axis=1) % 65536).astype(np.uint16)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_a_damaged_image_of_16_bits_is_an_error_not_half_a_picture(tmp_path, name):
    deep = smooth_16_bits(300, 400)
    exif = Image.Exif()
    exif[0x0112] = 1  # in a PNG it comes before the pixels, and is read without them
    options = {"compression": "tiff_lzw"} if name == "a.tiff" else {"exif": exif}
    Image.fromarray(deep).save(tmp_path / name, **options)
    assert np.array_equal(decode(tmp_path / name)[..., 0], np.rint(deep / 257))
    data = bytearray((tmp_path / name).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = b"\xff" * 200
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DecodeError, match=f"{name}: damaged"):
        decode(tmp_path / name)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_an_image_of_16_bits_that_is_cut_off_is_damaged_not_unsupported(tmp_path, name):
    Image.fromarray(smooth_16_bits(300, 400)).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for share in (0.9, 0.5):
        (tmp_path / name).write_bytes(data[: int(share * len(data))])
        with pytest.raises(DecodeError, match=f"{name}: damaged"):
            decode(tmp_path / name)


@pytest.mark.parametrize("options", [{"compression": "lzma"}, {"big_tiff": True}])
def test_a_whole_tiff_of_16_bits_that_ffmpeg_cannot_read_is_unsupported(tmp_path, options):
    Image.fromarray(smooth_16_bits(40, 60)).save(tmp_path / "a.tiff", **options)
    with pytest.raises(UnsupportedCodec, match=r"a\.tiff: no decoder for this 16-bit image"):
        decode(tmp_path / "a.tiff")


def test_a_tiff_of_16_bits_may_say_at_what_resolution_it_was_scanned(tmp_path):
    """A tag that FFmpeg does not know, of which it makes an error when it is to be strict."""
    deep = smooth_16_bits(40, 60)
    Image.fromarray(deep).save(tmp_path / "a.tiff", dpi=(300, 300))
    with Image.open(tmp_path / "a.tiff") as scan:
        assert scan.tag_v2[296] == 2  # ResolutionUnit: inches
    assert np.array_equal(decode(tmp_path / "a.tiff")[..., 0], np.rint(deep / 257))


def test_a_tiled_tiff_of_16_bits_is_unsupported_and_not_a_black_picture(tmp_path):
    tile = np.full((16, 16), 40_000, "<u2").tobytes()
    tags = [
        (256, 16), (257, 16), (258, 16), (259, 1), (262, 1), (277, 1), (322, 16), (323, 16),
        (324, 8 + 2 + 10 * 12 + 4), (325, len(tile)),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    (tmp_path / "a.tiff").write_bytes(head + directory + bytes(4) + tile)
    assert image.facts(str(tmp_path / "a.tiff"), PIXELS).bits == 16
    with pytest.raises(UnsupportedCodec, match=r"a\.tiff: no decoder"):
        decode(tmp_path / "a.tiff")


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


# --- what is turned away ------------------------------------------------------------------------


def box(kind, *parts):
    """A box of ISO/IEC 14496-12."""
    return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)


def full_box(kind, version, flags, *parts):
    return box(kind, struct.pack(">I", version << 24 | flags), *parts)


def write_heic(path, tile):
    """A picture of two by two tiles, each coded in HEVC: ISO/IEC 23008-12, 6.6.2.3."""
    height, width = tile.shape[:2]
    quiet = {"x265-params": "log-level=none"}
    mp4 = encode(path.with_suffix(".mp4"), [tile] * 5, "libx265", options=quiet).read_bytes()
    at = mp4.index(b"hvcC") - 4
    hevc = mp4[at : at + struct.unpack(">I", mp4[at : at + 4])[0]]
    with av.open(str(path.with_suffix(".mp4"))) as container:
        coded = bytes(next(p for p in container.demux(video=0) if p.is_keyframe))
    grid = bytes([0, 0, 1, 1]) + struct.pack(">HH", 2 * width, 2 * height)
    items = [(1, b"grid", 0, grid), *((n, b"hvc1", 1, coded) for n in range(2, 6))]
    names = [
        full_box(b"infe", 2, hidden, struct.pack(">HH4s", n, 0, kind), b"\0")
        for n, kind, hidden, _ in items
    ]
    sizes = [
        full_box(b"ispe", 0, 0, struct.pack(">II", w, h))
        for w, h in ((width, height), (2 * width, 2 * height))
    ]
    uses = [struct.pack(">HBB", 1, 1, 0x83)]
    uses += [struct.pack(">HBBB", n, 2, 0x81, 0x82) for n in range(2, 6)]

    def written(offset):
        places = []
        for n, _, _, data in items:
            places.append(struct.pack(">HHHII", n, 0, 1, offset, len(data)))
            offset += len(data)
        return box(b"ftyp", b"heic", bytes(4), b"mif1", b"heic") + full_box(
            b"meta", 0, 0,
            full_box(b"hdlr", 0, 0, struct.pack(">I4s12x", 0, b"pict"), b"\0"),
            full_box(b"pitm", 0, 0, struct.pack(">H", 1)),
            full_box(b"iinf", 0, 0, struct.pack(">H", len(items)), *names),
            full_box(b"iref", 0, 0, box(b"dimg", struct.pack(">HH4H", 1, 4, 2, 3, 4, 5))),
            box(b"iprp", box(b"ipco", hevc, *sizes),
                full_box(b"ipma", 0, 0, struct.pack(">I", len(uses)), *uses)),
            full_box(b"iloc", 0, 0, b"\x44\0", struct.pack(">H", len(items)), *places),
        )  # fmt: skip

    head = written(len(written(0)) + 8)
    path.write_bytes(head + box(b"mdat", *(data for *_, data in items)))


def test_a_heic_photo_is_turned_away_and_not_scored_by_one_of_its_tiles(tmp_path, picture):
    path = tmp_path / "photo.heic"
    write_heic(path, np.ascontiguousarray(picture[:64, :64]))
    with av.open(str(path)) as container:  # what FFmpeg makes of it
        assert [(s.width, s.height) for s in container.streams.video] == [(64, 64)] * 4
    for opened in (
        lambda: probe(str(path), SampleSpec("uniform", 16), PIXELS),
        lambda: decode(path),
    ):
        with pytest.raises(UnsupportedCodec, match=r"photo\.heic: HEIC.*JPEG, PNG or AVIF"):
            opened()


def write_tiff(path, picture, tags, **options):
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        directory[tag] = value
    Image.fromarray(picture).save(path, format="TIFF", tiffinfo=directory, **options)


@pytest.mark.parametrize(
    "tags",
    [
        {254: 1},  # NewSubfileType: a reduced picture, as NEF and ARW begin with
        {254: 3},
        {50706: bytes([1, 4, 0, 0])},  # DNGVersion
        {254: 0, 50706: bytes([1, 7, 0, 0])},
    ],
)
@pytest.mark.parametrize("big_tiff", [False, True])
def test_camera_raw_is_turned_away_and_not_scored_by_its_thumbnail(
    tmp_path, picture, tags, big_tiff
):
    path = tmp_path / "photo.raw"
    write_tiff(path, picture, tags, big_tiff=big_tiff)
    assert_is_raw(path)


@pytest.mark.parametrize(
    "head", [b"II*\0\x10\0\0\0CR\x02\0", box(b"ftyp", b"crx ", bytes(4), b"crx isom")]
)
def test_canons_camera_raw_is_known_by_its_first_bytes(tmp_path, head):
    path = tmp_path / "photo.raw"
    path.write_bytes(head + bytes(1000))
    assert_is_raw(path)


def assert_is_raw(path):
    assert kind_of(path.read_bytes()) == "image"
    for opened in (lambda: image.facts(str(path), PIXELS), lambda: decode(path)):
        with pytest.raises(UnsupportedCodec, match=r"photo\.raw: camera RAW.*TIFF or PNG"):
            opened()


@pytest.mark.parametrize("tags", [{}, {254: 0}, {254: 2}])
def test_a_tiff_of_several_pages_or_sizes_is_its_first_picture(tmp_path, picture, tags):
    """A page of a document, or the full size of a pyramid, has no thumbnail's mark."""
    smaller = Image.fromarray(picture[::2, ::2])
    smaller.encoderinfo = {"tiffinfo": {254: 1}}
    write_tiff(tmp_path / "a.tiff", picture, tags, save_all=True, append_images=[smaller])
    with Image.open(tmp_path / "a.tiff") as pages:
        pages.seek(1)
        assert pages.tag_v2[254] == 1
    assert np.array_equal(decode(tmp_path / "a.tiff"), picture)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("offset", [2**32 - 1, 2**64 - 1, 2**63])
def test_a_tiff_whose_directory_is_beyond_its_end_is_damaged(tmp_path, offset):
    path = tmp_path / "a.tiff"
    head = b"II*\0" + struct.pack("<I", offset) if offset < 2**32 else b""
    path.write_bytes((head or b"II+\0\x08\0\0\0" + struct.pack("<Q", offset)) + bytes(100))
    with pytest.raises(DecodeError, match=r"a\.tiff: damaged"):
        decode(path)


@pytest.mark.parametrize(
    ("major", "compatible", "kind", "turned_away"),
    [
        (b"heic", b"mif1heic", "image", True),
        (b"mif1", b"mif1heicmiaf", "image", True),
        (b"msf1", b"msf1hevciso8", "image", True),
        (b"avif", b"avifmif1miaf", "image", False),
        (b"avis", b"avismsf1mif1", "image", False),
        (b"mif1", b"mif1avifmiaf", "image", False),
        (b"mp42", b"mif1heicisommp42", "video", False),  # a video with a cover
        (b"qt  ", b"qt  ", "video", False),
    ],
)
def test_the_brands_of_an_iso_file_tell_pictures_from_videos(
    tmp_path, major, compatible, kind, turned_away
):
    path = tmp_path / "a.iso"
    path.write_bytes(box(b"ftyp", major, bytes(4), compatible))
    assert kind_of(path.read_bytes()) == kind
    with pytest.raises((DecodeError, UnsupportedCodec)) as caught:
        image.facts(str(path), PIXELS)
    assert ("HEIC" in str(caught.value)) == turned_away


def test_a_video_with_a_picture_among_its_compatible_brands_stays_a_video(tmp_path, picture):
    path = encode(tmp_path / "film.mp4", [picture] * 5)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"iso2", b"mif1", 1))
    assert data[:32].count(b"iso2") == 1
    assert probe(str(path), SampleSpec("all"), PIXELS).facts.kind == "video"


def test_icons_are_no_media_and_mpeg_streams_are():
    assert kind_of(b"\x00\x00\x01\x00\x02\x00" + bytes(64)) is None
    assert kind_of(b"\x00\x00\x01\xba" + bytes(64)) == "video"
