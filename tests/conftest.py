"""Media that the tests make themselves, and where the optional test data lies."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported. Idle threads that spin make everything crawl on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before Ray is imported, as the commands do it: what a test starts listens on loopback only.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

# A busy machine is slow, and no test is about that.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def real_media() -> Path | None:
    """The project's larger test data, if there is any: $TOPIQ_TEST_DATA, else ../shared/data."""
    found = Path(os.environ.get("TOPIQ_TEST_DATA") or Path(__file__).parents[2] / "shared/data")
    return found if found.is_dir() else None


@pytest.fixture(scope="session")
def data_dir(real_media: Path | None) -> Path:
    """As `real_media`, for tests that are about it alone."""
    if real_media is None:
        pytest.skip("real test media are absent: set TOPIQ_TEST_DATA to their folder")
    return real_media


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One short clip per codec and container, 96x64, 40 frames at 25 a second, 12 to a GOP."""
    from jobs.sample_media import encode, pan  # not where there is no PyAV: test_gpu.py needs none

    folder = tmp_path_factory.mktemp("clips")
    kinds = {
        "h264.mp4": ("libx264", {"bf": "2", "crf": "20"}),
        "h264.mkv": ("libx264", {"bf": "2", "crf": "20"}),
        "h264.ts": ("libx264", {"crf": "20"}),
        "h264.flv": ("libx264", {"crf": "20"}),
        "hevc.mp4": ("libx265", {"x265-params": "log-level=0"}),
        "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
        "av1.mp4": ("libsvtav1", {"preset": "11"}),
        "mpeg4.avi": ("mpeg4", {}),
        "mpeg2.mpg": ("mpeg2video", {}),
    }
    return {
        name: encode(folder / name, pan(64, 96, 40, seed=1), codec, options=options)
        for name, (codec, options) in kinds.items()
    }


@pytest.fixture(scope="session")
def picture():
    """A generated picture, uint8 RGB [80, 120, 3]."""
    from jobs.sample_media import landscape

    return landscape(80, 120, seed=5)
