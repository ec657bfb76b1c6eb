"""Thousands of damaged files: each has exactly one outcome, and none takes anything else down.

`make test` runs 200; TOPIQ_FUZZ=N in the environment (`make chaos`) runs N of them.
"""

import os
import random

import pytest

from pipeline.errors import MediaError
from pipeline.media.guard import Guard
from pipeline.media.sample import SampleSpec, plan_samples

MUTANTS = int(os.environ.get("TOPIQ_FUZZ", "200"))
PIXELS, BYTES = 9_000_000, 256 << 20
TIMEOUT_S = 20.0


def truncated(data, chance):
    """Cut anywhere, or where a box of ISO media or an EBML element seems to begin."""
    if chance.random() < 0.5:
        marks = [
            m for m in (b"moov", b"mdat", b"trak", b"stbl", b"moof", b"\x1fC\xb6u") if m in data
        ]
        if marks:
            return data[: data.index(chance.choice(marks)) + chance.choice((-4, 0, 4, 5))]
    return data[: chance.randrange(len(data))]


def flipped(data, chance):
    out = bytearray(data)
    for _ in range(chance.choice((1, 4, 32, 256))):
        out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def zeroed(data, chance):
    begin = chance.randrange(len(data))
    end = min(len(data), begin + chance.choice((1, 16, 256, 4096)))
    return data[:begin] + bytes(end - begin) + data[end:]


def lying(data, chance):
    """Numbers in the first kilobyte become the extremes that overflow and underflow."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 2, 8))):
        at = chance.randrange(4, min(1024, len(out) - 4))
        extremes = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\x00\x00\xff\xff")
        out[at : at + 4] = chance.choice(extremes)
    return bytes(out)


def repeated(data, chance):
    begin = chance.randrange(len(data))
    part = data[begin : begin + chance.randrange(1, 5000)]
    return data[:begin] + part + data[begin:]


MUTATIONS = (truncated, flipped, zeroed, lying, repeated)


@pytest.fixture(scope="module")
def seeds(clips, real_media):
    """The project's own clips, and the small real ones where the larger test data lies."""
    real = sorted((real_media / "clips").iterdir()) if real_media else []
    return [path for path in [*clips.values(), *real] if path.stat().st_size < 400_000]


def outcome(guard, path):
    """What a run would make of the file: the codes of failures, or `scored`."""
    try:
        timeline = guard.probe(str(path), "uniform:3", PIXELS, TIMEOUT_S).timeline
        samples = plan_samples(SampleSpec("uniform", 3), timeline)
        times, weights = list(samples.times), list(samples.weights)
        found = guard.decode_video(str(path), times, weights, PIXELS, BYTES, TIMEOUT_S)
    except MediaError as error:
        return error.code if path.name in str(error) else "nameless"
    assert len(found.pts_s) == len(found.weight_s) == len(found.heights) == len(found.widths) > 0
    assert len(found.pixels) == sum(
        3 * h * w for h, w in zip(found.heights, found.widths, strict=True)
    )
    return "scored"


def test_every_mutant_has_one_outcome_and_its_neighbours_are_decoded(seeds, tmp_path):
    guard = Guard(1 << 30)
    outcomes: dict[str, str] = {}
    try:
        for seed in range(MUTANTS):
            chance = random.Random(seed)
            source = seeds[seed % len(seeds)]
            mutate = MUTATIONS[seed // len(seeds) % len(MUTATIONS)]
            path = tmp_path / f"{seed}-{mutate.__name__}-{source.name}"
            path.write_bytes(mutate(source.read_bytes(), chance))
            outcomes[path.name] = outcome(guard, path)
            path.unlink()
            if seed % 20 == 0:
                assert outcome(guard, source) == "scored"
    finally:
        guard.close()
    assert len(outcomes) == MUTANTS
    assert "scored" in outcomes.values()
    assert "decode_error" in outcomes.values()
    # A crash or a hang would cost only its own file, but none is known: look at it.
    ours = {"nameless", "internal_error", "decode_crash", "decode_timeout", "decode_memory"}
    assert {name: code for name, code in outcomes.items() if code in ours} == {}
