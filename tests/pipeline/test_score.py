"""What goes between the stages."""

import numpy as np
import pyarrow as pa

from pipeline import score
from pipeline.media.guard import Frames


def unit(name, pictures):
    """What the decode stage has of a unit: its row, and its frames."""
    planned = dict.fromkeys(score.PLAN_COLUMNS, name) | {"unit_index": 0}
    heights, widths = ([picture.shape[side] for picture in pictures] for side in (0, 1))
    pixels = b"".join(picture.tobytes() for picture in pictures)
    times = [0.0] * len(pictures)
    return score.begun(planned, "run", 0), Frames(times, times, heights, widths, pixels)


def test_frames_come_out_of_a_table_as_they_were_and_are_not_copied():
    random = np.random.default_rng(1)
    sizes = [[(48, 64), (40, 32)], [], [(33, 35)], [(64, 48)] * 3]
    units = [
        [random.integers(0, 256, (h, w, 3), np.uint8) for h, w in of_unit] for of_unit in sizes
    ]
    rows = [unit(f"u{n}", pictures) for n, pictures in enumerate(units)]
    table = pa.concat_tables([score.with_frames(rows[:3]), score.with_frames(rows[3:])]).slice(1)
    memory = [
        np.frombuffer(chunk.values.buffers()[2], np.uint8) for chunk in table["frames"].chunks
    ]
    for index, pictures in enumerate(units[1:]):
        found = list(score.frames_of(table, index))
        assert len(found) == len(pictures)
        for ours, theirs in zip(found, pictures, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert any(np.shares_memory(ours, part) for part in memory)
