"""What decoding the frames of a sampling plan costs, beside what one would do without one.

    python benchmarks/decode.py [--rounds N] [--plans uniform:8,fps:1,...] [--json FILE] [CLIP]

Ways, each on one thread, in turn, from a local file to RGB frames in memory:

- planned: `decode_at`, as the pipeline does it
- sequential: PyAV decodes from the start to the last sample; samples become PIL images
- torchcodec: `get_frames_played_at` of the same moments, when torchcodec can be imported

Prints CPU seconds, sampled frames a second (of CPU and of wall time) and bytes read, as medians
over rounds, and medians of each round's ratio to `planned`. Without CLIP, a clip of 60 s is made:
1080p30 H.264 (x264 veryfast, crf 18, 3 B frames), a keyframe every 2 s.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from jobs.sample_media import encode, landscape, repeat
from pipeline.media.decode import Limits, decode_at
from pipeline.media.probe import probe
from pipeline.media.sample import SampleSpec, plan_samples

LIMITS = Limits(max_pixels=25_000_000, max_bytes=1 << 40)
FPS, GOP = 30, 60
MEASURES = ("cpu_s", "wall_s", "bytes_read")

Way = Callable[[str, Sequence[float]], int]


def planned(clip: str, times: Sequence[float]) -> int:
    """The frames at `times` by the pipeline's decoder; how many there were."""
    sizes = []
    decode_at(clip, times, [1.0] * len(times), LIMITS, lambda rgb: sizes.append(rgb.shape))
    return len(sizes)


def sequential(clip: str, times: Sequence[float]) -> int:
    """The same by decoding everything up to the last sample, and PIL."""
    taken = 0
    with av.open(clip) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            if frame.time is not None and frame.time > times[taken] - 0.5 / FPS:
                np.asarray(frame.to_image())
                taken += 1
                if taken == len(times):
                    break
    return taken


def torchcodec_way() -> Way | None:
    """The same by torchcodec, or None where that cannot be imported."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError):
        return None

    def decode(clip: str, times: Sequence[float]) -> int:
        decoder = VideoDecoder(clip, num_ffmpeg_threads=1)
        return len(decoder.get_frames_played_at(list(times)).data)

    return decode


def moving(count: int) -> Iterator[npt.NDArray[np.uint8]]:
    """A window of 1080p that moves over a textured scene."""
    scene = landscape(270, 480 + count // 4 + 1, seed=4).repeat(4, axis=0).repeat(4, axis=1)
    noise = np.random.default_rng(1).integers(-9, 9, scene.shape, np.int16)
    scene = (scene + noise).clip(0, 255).astype(np.uint8)
    for index in range(count):
        yield np.ascontiguousarray(scene[:, index : index + 1920])


def sixty_seconds(folder: Path) -> str:
    """The clip: four GOPs, really encoded, whose packets are repeated up to 60 s."""
    options = {"preset": "veryfast", "crf": "18"}
    short = encode(folder / "short.mp4", moving(4 * GOP), fps=FPS, gop=GOP, options=options)
    return str(repeat(short, folder / "clip.mp4", 60 * FPS))


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "av": av.__version__,
        "ffmpeg": av.ffmpeg_version_info,
    }


def bytes_read() -> int:
    """Bytes that this process has read from files so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def measured(way: Way, clip: str, times: Sequence[float]) -> dict[str, float]:
    """One run."""
    before = time.process_time(), time.perf_counter(), bytes_read()
    frames = way(clip, times)
    after = time.process_time(), time.perf_counter(), bytes_read()
    if frames != len(times):
        raise SystemExit(f"{frames} frames came instead of {len(times)}.")
    return dict(zip(MEASURES, (b - a for a, b in zip(before, after, strict=True)), strict=True))


def compared(clip: str, plan: str, ways: dict[str, Way], rounds: int) -> dict[str, object]:
    """Medians of every way and of its ratios to `planned`, over interleaved rounds."""
    spec = SampleSpec.parse(plan)
    times = plan_samples(spec, probe(clip, spec, LIMITS.max_pixels).timeline).times
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for way in ways.values():  # warm up
        way(clip, times[:2])
    for _ in range(rounds):
        for name, way in ways.items():
            runs[name].append(measured(way, clip, times))
    summary: dict[str, object] = {"plan": plan, "frames": len(times), "rounds": rounds}
    for name, found in runs.items():
        median = {m: statistics.median(r[m] for r in found) for m in MEASURES}
        ratios = {
            m: statistics.median(r[m] / p[m] for r, p in zip(found, runs["planned"], strict=True))
            for m in MEASURES
        }
        summary[name] = {
            **median,
            "frames_per_cpu_s": len(times) / median["cpu_s"],
            "frames_per_wall_s": len(times) / median["wall_s"],
            "ratio_to_planned": ratios,
        }
        print(
            f"{plan:10} {name:10} {median['cpu_s']:7.2f} CPU s ({ratios['cpu_s']:5.2f} x)  "
            f"{len(times) / median['cpu_s']:6.1f} frames a CPU s "
            f"{len(times) / median['wall_s']:6.1f} a wall s  "
            f"{median['bytes_read'] / 1e6:7.1f} MB read ({ratios['bytes_read']:.2f} x)"
        )
    return summary


def main() -> None:
    """Parse, measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plans", default="uniform:8,uniform:16,fps:1")
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    parser.add_argument("clip", nargs="?")
    options = parser.parse_args()
    ways: dict[str, Way] = {"planned": planned, "sequential": sequential}
    about = machine()
    other = torchcodec_way()
    if other is not None:
        ways["torchcodec"] = other
        about["torchcodec"] = version("torchcodec")
    with tempfile.TemporaryDirectory() as folder:
        clip = options.clip or sixty_seconds(Path(folder))
        size = Path(clip).stat().st_size
        print(f"{about['cpu']}, {about['cpus']} CPUs, load {os.getloadavg()[0]:.1f}")
        print(f"clip of {size / 1e6:.1f} MB")
        plans = [compared(clip, p, ways, options.rounds) for p in options.plans.split(",")]
    if options.json:
        kept = {"machine": about, "clip_bytes": size, "plans": plans}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
