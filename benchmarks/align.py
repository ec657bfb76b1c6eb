"""How often alignment finds the offset of a rendition, refuses to say, or is wrong.

    python benchmarks/align.py [--length FRAMES] [--made N] [CLIP ...]

Makes pairs with a known offset from N generated scenes and from clips (of constant frame rate, with
at least FRAMES + 24 frames), encodes them, and lets `estimate_offset` look at what comes back. An
offset is right within half a frame of the slower side. `none` counts pairs that have no offset, or
none that can be told: refusing those is right, accepting any is wrong. Prints a table, and the
cases that were not found.
"""

import argparse
import collections
import statistics
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from jobs.sample_pairs import MARGIN, Case, Maker, Scene, scene_from, track, unrelated, wander
from pipeline.media.align import Estimate, estimate_offset

MAX_OFFSET_S = 1.0
RATES = [Fraction(24000, 1001), *map(Fraction, (24, 25)), Fraction(30000, 1001)]
RATES += [Fraction(50), Fraction(60)]


def cases(maker: Maker) -> Iterator[Case]:
    """Everything that is tried with one scene."""
    yield from (maker.offset(shift) for shift in range(-MARGIN, MARGIN + 1))
    yield from (maker.poor(shift) for shift in (-7, 0, 4))
    yield from (maker.darker(shift) for shift in (-3, 0, 10))
    yield from (maker.dropped(shift, share, 1) for shift in (-5, 0, 8) for share in (0.1, 0.4))
    yield from (maker.frozen(shift, 0.2, 2) for shift in (-6, 0, 9))
    other = [rate for rate in RATES if abs(rate - maker.scene.fps) > 0.5]
    yield from (maker.rate(shift, to) for shift in (-4, 0, 11) for to in other)
    yield from (maker.late(shift, 1.4) for shift in (-2, 0, 5))
    yield maker.still()
    yield from (maker.periodic(period) for period in (2, 7, 12, 20))
    yield from (maker.there_and_back(period) for period in (5, 10))
    yield from (maker.reversed(), maker.faster(), maker.spliced())


def outcome(case: Case, estimate: Estimate) -> str:
    """`found`, `refused` or `wrong`."""
    if not estimate.trusted:
        return "refused"
    if case.offset_s is None:
        return "wrong"
    near = abs(estimate.offset_s - case.offset_s) <= case.tolerance_s + 1e-3
    return "found" if near else "wrong"


def main() -> None:
    """Make, estimate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=60)
    parser.add_argument("--made", type=int, default=3)
    parser.add_argument("clips", nargs="*", type=Path)
    options = parser.parse_args()
    needed = options.length + 2 * MARGIN
    scenes: list[Scene] = [wander(needed, seed) for seed in range(options.made)]
    scenes += [scene_from(clip, needed) for clip in options.clips]
    results: list[tuple[Case, Estimate, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        makers = []
        for number, scene in enumerate(scenes):
            if len(scene.frames) < needed:
                print(f"{scene.name}: left out, {len(scene.frames)} frames are too few")
                continue
            makers.append(Maker(Path(folder) / str(number), scene, options.length))
        made = (case for maker in makers for case in cases(maker))
        for case in [*made, *unrelated(makers)]:
            distorted, reference = track(case.distorted), track(case.reference)
            around_s = reference.pts_s[0] - distorted.pts_s[0]
            started = time.perf_counter()
            estimate = estimate_offset(distorted, reference, MAX_OFFSET_S, around_s)
            results.append((case, estimate, time.perf_counter() - started))
    report(results)


def report(results: list[tuple[Case, Estimate, float]]) -> None:
    """The table by kind, then what was not found."""
    print("| kind | pairs | offset known | found | refused | wrong | lowest confidence found |")
    print("|---|---|---|---|---|---|---|")
    totals: collections.Counter[str] = collections.Counter()
    for kind in dict.fromkeys(case.kind for case, *_ in results):
        some = [(case, estimate) for case, estimate, _ in results if case.kind == kind]
        count = collections.Counter(outcome(case, estimate) for case, estimate in some)
        count["pairs"] = len(some)
        count["known"] = sum(case.offset_s is not None for case, _ in some)
        totals += count
        found = [e.confidence for case, e in some if outcome(case, e) == "found"]
        least = f"{min(found):.2f}" if found else "-"
        print(f"| {kind} | {_cells(count)} | {least} |")
    print(f"| **all** | {_cells(totals)} | |")
    print(f"\nFound {totals['found'] / totals['known']:.1%} of the known offsets.")
    print(f"Median {statistics.median(t for *_, t in results) * 1000:.0f} ms per estimate.\n")
    for case, estimate, _ in results:
        if outcome(case, estimate) == "wrong" or (
            case.offset_s is not None and not estimate.trusted
        ):
            print(outcome(case, estimate), case.name, case.offset_s, estimate)


def _cells(count: collections.Counter[str]) -> str:
    return " | ".join(str(count[k]) for k in ("pairs", "known", "found", "refused", "wrong"))


if __name__ == "__main__":
    main()
