import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.sample_media import encode, landscape, pan
from pipeline.errors import MediaError
from pipeline.media.colour import Policy
from pipeline.media.decode import Limits, decode_at
from pipeline.media.letterbox import Box, lit, luma, picture
from pipeline.media.probe import probe
from pipeline.media.sample import SampleSpec

LIMITS = Limits(10**8, 10**10)


def framed(inner, top, bottom, left=0, right=0, black=0):
    """A picture between bars of black."""
    return np.pad(inner, ((top, bottom), (left, right), (0, 0)), constant_values=black)


def found(*frames):
    return picture(frames[0].shape[:2], [lit(luma(f)) for f in frames])


def test_bars_are_found_to_the_pixel():
    scene = landscape(60, 120)
    assert found(framed(scene, 20, 20)) == Box(0, 20, 120, 80)
    assert found(framed(scene, 0, 0, 15, 15)) == Box(15, 0, 135, 60)
    assert found(framed(scene, 10, 10, 30, 30)) == Box(30, 10, 150, 70)


def test_bars_with_the_noise_of_a_codec_are_found():
    noisy = framed(landscape(60, 120), 20, 20)
    noise = np.random.default_rng(0).integers(0, 6, noisy.shape).astype(np.uint8)
    assert found(np.where(noisy == 0, noise, noisy)) == Box(0, 20, 120, 80)


def test_a_picture_without_bars_is_left_whole():
    assert found(landscape(100, 120)) is None


def test_black_on_one_side_only_is_part_of_the_picture():
    assert found(framed(landscape(60, 120), 0, 40)) is None
    assert found(framed(landscape(60, 120), 20, 0)) is None


def test_a_dark_scene_does_not_make_the_bars_wider():
    bright, dark = landscape(60, 120), landscape(60, 120)
    dark[:20] = 0
    assert found(framed(dark, 20, 20), framed(bright, 20, 20)) == Box(0, 20, 120, 80)
    black = np.zeros((100, 120, 3), np.uint8)
    assert found(black, framed(bright, 20, 20), black) == Box(0, 20, 120, 80)


def test_a_black_video_has_no_bars():
    assert found(np.zeros((100, 120, 3), np.uint8)) is None


@given(st.integers(4, 40), st.integers(0, 2), st.integers(8, 60), st.integers(11, 255))
def test_nothing_but_black_is_ever_cut_off(bar, off, height, level):
    frame = framed(np.full((height, 32, 3), level, np.uint8), bar, bar + off)
    box = found(frame)
    assert box == Box(0, bar, 32, bar + height)
    outside = frame.copy()
    box.of(outside)[:] = 0
    assert not outside.any()


@given(st.tuples(*4 * [st.integers(0, 5000)]))
def test_a_box_reads_back_as_it_was_written(sizes):
    left, top, width, height = sizes
    box = Box(left, top, left + width, top + height)
    assert Box.parse(str(box)) == box
    assert str(box) == f"{width}:{height}:{left}:{top}"


@pytest.fixture
def film(tmp_path):
    """32 columns of bars on both sides of a turned video: top and bottom once it is upright."""
    frames = [framed(f, 0, 0, 32, 32) for f in pan(96, 128, 25)]
    return encode(tmp_path / "film.mp4", frames, rotation=90)


def test_auto_scores_the_upright_picture_between_the_bars(film):
    spec = SampleSpec("uniform", 4)
    crop = probe(str(film), spec, 10**8, Policy(crop="auto")).facts.crop
    assert crop == "96:128:0:32"
    whole = decode_at(str(film), [0.5], [1.0], LIMITS).shots[0].rgb
    cut = decode_at(str(film), [0.5], [1.0], LIMITS, crop=crop).shots[0].rgb
    assert cut.flags.c_contiguous
    assert np.array_equal(cut, whole[32:160])


def test_bars_stay_unless_they_are_asked_to_go(film):
    assert probe(str(film), SampleSpec("uniform", 4), 10**8).facts.crop is None


def test_a_crop_that_a_frame_is_too_small_for_fails_with_a_reason(film):
    with pytest.raises(MediaError, match=r"film\.mp4.*crop") as caught:
        decode_at(str(film), [0.5], [1.0], LIMITS, crop="100:500:0:0")
    assert caught.value.code == "decode_error"


def test_what_the_codec_pads_is_cut_off_and_recorded(tmp_path):
    path = encode(tmp_path / "odd.mp4", pan(90, 100, 3))
    found = decode_at(str(path), [0.0], [1.0], LIMITS)
    assert found.shots[0].rgb.shape == (90, 100, 3)
    assert found.look.codec_padding == "12x6"  # H.264 codes blocks of 16x16: 112x96
