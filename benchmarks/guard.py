"""What the guarded decoder costs: frames a second with and without the child process.

    python benchmarks/guard.py [--rounds N] [CLIP]

Decodes the same work units (all frames of a 1080p clip, 32 to a unit) both ways, in turn, into
the Arrow table that goes to the scorers. Prints the median over rounds of the ratio of times.
"""

import argparse
import mmap
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.sample_media import encode, landscape
from pipeline.media.decode import Limits, decode_at
from pipeline.media.guard import Frames, Guard
from pipeline.media.probe import probe
from pipeline.media.sample import SampleSpec, plan_samples, slice_units
from pipeline.score import with_frames

PIXELS, BYTES = 25_000_000, 1 << 30
UNIT_FRAMES = 32
ROW = {
    "unit_id": "u", "item_id": "i", "uri": "u", "model": "m", "unit_index": 0, "attempt": 1,
    "partial": False, "n_missing": 0, "run_id": "r",
}  # fmt: skip


def moving(count: int) -> list[np.ndarray]:
    """A window of 1080p that moves over a textured scene."""
    scene = landscape(270, 480 + count, seed=4).repeat(4, axis=0).repeat(4, axis=1).astype(np.int16)
    scene += np.random.default_rng(1).integers(-9, 9, scene.shape, np.int16)
    scene = scene.clip(0, 255).astype(np.uint8)
    return [np.ascontiguousarray(scene[:, 4 * i : 4 * i + 1920]) for i in range(count)]


def direct(clip: str, times: list[float]) -> pa.Table:
    """One unit, decoded in this process."""
    found = decode_at(clip, times, [1.0] * len(times), Limits(PIXELS, BYTES))
    shots = found.shots
    held = mmap.mmap(-1, sum(s.rgb.nbytes for s in shots))
    pixels = np.frombuffer(held, np.uint8)
    at = 0
    for shot in shots:
        pixels[at : at + shot.rgb.nbytes] = shot.rgb.reshape(-1)
        at += shot.rgb.nbytes
    heights, widths = zip(*(s.rgb.shape[:2] for s in shots), strict=True)
    times, weights = [s.pts_s for s in shots], [s.weight_s for s in shots]
    return with_frames([(ROW, Frames(times, weights, list(heights), list(widths), held))])


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("clip", nargs="?")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip = options.clip or str(encode(Path(folder) / "clip.mp4", moving(128)))
        timeline = probe(clip, SampleSpec("all"), PIXELS).timeline
        samples = plan_samples(SampleSpec("all"), timeline)
        units = slice_units(samples, timeline.keyframe_times, UNIT_FRAMES)
        guard = Guard(3 << 30)
        store = pa.allocate_buffer(2 * UNIT_FRAMES * PIXELS)

        def guarded(times: list[float]) -> pa.Table:
            weights = [1.0] * len(times)
            return with_frames(
                [(ROW, guard.decode_video(clip, times, weights, PIXELS, BYTES, 600.0))]
            )

        def seconds(decode: object) -> float:
            started = time.perf_counter()
            for unit in units:
                table = decode(list(unit.times))  # type: ignore[operator]
                # As Ray does: serialise the table into memory that is shared with the scorer.
                sink = pa.FixedSizeBufferWriter(store)
                with pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
            return time.perf_counter() - started

        ways = {"direct": lambda times: direct(clip, times), "guarded": guarded}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range(options.rounds + 1):
            for name, way in ways.items():
                spent = seconds(way)
                if round_:  # the first one warms up
                    taken[name].append(spent)
        guard.close()
    frames = len(samples.times)
    for name, times in taken.items():
        print(f"{name:8} {frames / statistics.median(times):7.1f} frames a second")
    ratios = [g / d for g, d in zip(taken["guarded"], taken["direct"], strict=True)]
    print(f"guarded takes {statistics.median(ratios):.3f} times as long, of {len(ratios)} rounds:")
    print(" ".join(f"{r:.3f}" for r in ratios))


if __name__ == "__main__":
    main()
