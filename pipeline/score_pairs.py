"""score, with a reference: units that share a stretch of it are decoded and scored together.

    plan/                one row per work unit
       |  as_ladders     CPU, rows of a block -> 1 row a ladder: `units`, at most MOST_RENDITIONS
       v
       |  decode_ladders CPU task pool, 1 ladder -> 1 row: frames of the reference, once, and of
       v                 each rendition; or why there are none
    schemas.LADDER       in the object store, at most unit_bytes each
       |  ScorePairs     actor pool, 1 ladder -> 1 row a unit, without the frames
       v
    frame_scores/ and failures/    as in `score`

What a unit's row holds does not depend on which others are in its ladder.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline import catalog, schemas, score
from pipeline.config import Config
from pipeline.errors import DecodeError, MediaError
from pipeline.fidelity import MEASURES, fidelity
from pipeline.lookup import Lookup
from pipeline.media import guard
from pipeline.media.guard import Frames
from pipeline.media.planes import planes_of_rgb
from pipeline.monitor import Pulse
from pipeline.plan import MOST_RENDITIONS
from pipeline.transient import persistently

if TYPE_CHECKING:
    from topiq_core.scorer import Scorer

_COLUMNS = (
    *score.PLAN_COLUMNS, "ladder_id", "reference_times_s", "reference_crop", "fps",
)  # fmt: skip
# A frame may be found this far from the time that was planned, as a share of a frame's duration.
_NEAR = 0.5


def as_ladders(units: pa.Table) -> pa.Table:
    """Rows of the plan that share a `ladder_id`, as lists in one column, `units`."""
    ladders: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for unit in units.to_pylist():
        if unit["code"] is None:  # those with a code failed at planning and are on record
            ladders[unit["ladder_id"]].append(unit)
    parts = [
        members[start : start + MOST_RENDITIONS]
        for members in ladders.values()
        for start in range(0, len(members), MOST_RENDITIONS)
    ]
    schema = pa.schema([schemas.PLAN.field(name) for name in units.column_names])
    return pa.table({"units": pa.array(parts, pa.list_(pa.struct(list(schema))))})


def decode_ladders(
    ladders: pa.Table,
    config: Config,
    run_id: str,
    addresses: Lookup,
    earlier: Lookup,
    monitor: Any,
) -> Iterator[pa.Table]:
    """One row for each ladder: outcomes of its units, and all their frames.

    addresses: as for `score.run`, of references by the `item_id` of their URI; earlier: how often
    a unit was tried by earlier runs, by unit_id.
    """
    if score.stopped(config, monitor):
        return
    pulse = Pulse(monitor)
    for ladder in ladders["units"].to_pylist():
        for unit in ladder:
            unit["address"] = addresses.get(unit["item_id"], unit["uri"])
            key = catalog.item_id(unit["reference_uri"])
            unit["reference_address"] = addresses.get(key, unit["reference_uri"])
        before = [earlier.get(unit["unit_id"], 0) for unit in ladder]
        rows = [score.begun(unit, run_id, n) for unit, n in zip(ladder, before, strict=True)]
        yield _Ladder(ladder, rows, config, pulse).decoded()


class _Ladder:
    """Decodes one ladder: its rows are filled in, its frames kept in the order they came."""

    def __init__(
        self,
        units: list[dict[str, Any]],
        rows: list[dict[str, Any]],
        config: Config,
        pulse: Pulse,
    ) -> None:
        self.units, self.rows, self.config, self.pulse = units, rows, config, pulse
        self.decoder = guard.shared(config.decode_memory_bytes)
        self.pictures: list[Any] = []
        self.first: list[int] = []
        self.against: list[list[int]] = []

    def decoded(self) -> pa.Table:
        """The row between the stages."""
        shared = None
        if self.config.scale_to == "reference":
            times = sorted({t for unit in self.units for t in unit["reference_times_s"]})
            shared = _Reference(self, self.units[0], times)
        for unit, row in zip(self.units, self.rows, strict=True):
            started, before = time.perf_counter(), row["attempt"]
            self.first.append(len(self.pictures))
            self.against.append([])
            try:
                self._compare(unit, row, shared)
            except Exception as error:
                row |= score.failure("decode", error, unit, self.config, compares=True)
                row |= {"pts_s": unit["times_s"], "reference_pts_s": None}
                row["attempt"] = max(row["attempt"], before + 1)  # the reference may be at fault
            row["decode_s"] = time.perf_counter() - started
            self.pulse.beat()
        return self._table()

    def _compare(
        self, unit: dict[str, Any], row: dict[str, Any], shared: "_Reference | None"
    ) -> None:
        config, measured = self.config, bool(self.config.measures)
        if shared is not None:
            size = shared.frames.widths[0], shared.frames.heights[0]
            form = shared.frames.form
            ours = self.frames(unit, row, unit["address"], size=size, form=form)
            reference = shared
        else:
            ours = self.frames(unit, row, unit["address"])
            size = ours.widths[0], ours.heights[0]
            reference = _Reference(self, unit, unit["reference_times_s"], size, ours.form)
        score.refuse_partial(ours, unit["uri"], config)
        near = _NEAR / unit["fps"] if unit["fps"] else np.inf
        found = _positions(ours.pts_s, unit["times_s"], near)
        theirs = _positions(reference.frames.pts_s, unit["reference_times_s"], near)
        kept = [i for i, pair in enumerate(zip(found, theirs, strict=True)) if min(pair) >= 0]
        if not kept:
            raise DecodeError(
                f"{unit['uri']}: none of its frames and those of its reference could be decoded "
                "at the times that belong together."
            )
        pictures = list(ours.pictures())
        missing = len(found) - len(kept)
        problems = [p for p in (ours.problem, reference.frames.problem) if p]
        if missing and not problems:
            problems = [f"{missing} frames have no partner that could be decoded"]
        if problems and config.on_partial == "fail":
            raise DecodeError(f"{unit['uri']}: only a part can be compared ({problems[0]}).")
        row |= {
            "partial": bool(problems),
            "message": "; ".join(problems) or None,
            "n_missing": missing,
            "pts_s": [ours.pts_s[found[i]] for i in kept],
            "reference_pts_s": [reference.frames.pts_s[theirs[i]] for i in kept],
            "weight_s": [unit["weights_s"][i] for i in kept],
            "frame": score.form(ours),
            "wait_s": ours.wait_s,
        }
        if measured:
            row |= _measured(
                [(pictures[found[i]], reference.pictures[theirs[i]]) for i in kept], config
            )
        self.pictures += [pictures[found[i]][0] for i in kept]
        self.against[-1] = [reference.index(theirs[i]) for i in kept]

    def frames(
        self,
        unit: dict[str, Any],
        row: dict[str, Any],
        address: str,
        times: list[float] | None = None,
        crop: str | None = None,
        **shape: Any,
    ) -> Frames:
        """Frames of the item, or of its reference when `times` are given; all of one size."""
        config, timeout = self.config, self.config.decode_timeout_s
        wanted = unit["times_s"] if times is None else times
        weights = unit["weights_s"] if times is None else [1.0] * len(times)
        cut = unit["crop"] if times is None else crop

        def decoded(**shape: Any) -> Frames:
            if unit["kind"] == "image":
                size = shape.get("size")
                found = self.decoder.decode_image(
                    address, config.max_pixels, config.alpha, timeout, size
                )
                return replace(found, weight_s=weights)
            return self.decoder.decode_video(
                address, wanted, weights, config.max_pixels, 2 * config.unit_bytes, timeout,
                config.policy, cut, planes=bool(config.measures), **shape,
            )  # fmt: skip

        def attempt() -> Frames:
            if times is None:
                row["attempt"] += 1
            found = decoded(**shape)
            sizes = list(zip(found.widths, found.heights, strict=True))
            if len(set(sizes)) > 1:  # it changes its size on the way
                found = decoded(**shape | {"size": sizes[0], "form": found.form})
            return found

        return persistently(attempt, config.attempts)

    def _table(self) -> pa.Table:
        sizes = [picture.nbytes for picture in self.pictures]
        ends = np.cumsum([0, *sizes], dtype=np.int64)
        pixels = np.empty(ends[-1], np.uint8)
        for picture, begin, end in zip(self.pictures, ends, ends[1:], strict=False):
            pixels[begin:end] = picture.reshape(-1)
        blobs = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(sizes), [None, pa.py_buffer(ends), pa.py_buffer(pixels)]
        )
        columns = {
            "outcomes": [self.rows],
            "first": [self.first],
            "against": [self.against],
            "frames": pa.ListArray.from_arrays(pa.array([0, len(sizes)], pa.int32()), blobs),
            "widths": [[picture.shape[1] for picture in self.pictures]],
            "heights": [[picture.shape[0] for picture in self.pictures]],
        }
        arrays = [
            c if isinstance(c, pa.Array) else pa.array(c, schemas.LADDER.field(name).type)
            for name, c in columns.items()
        ]
        return pa.Table.from_arrays(arrays, schema=schemas.LADDER)


class _Reference:
    """Frames of a reference, decoded when the first unit needs them; some may need none at all.

    Raises the MediaError of the reference to every unit that asks.
    """

    def __init__(
        self,
        ladder: _Ladder,
        unit: dict[str, Any],
        times: list[float],
        size: tuple[int, int] | None = None,
        form: str | None = None,
    ) -> None:
        self.ladder = ladder
        self._decode: Callable[[], Frames] = lambda: ladder.frames(
            unit, {}, unit["reference_address"], times, unit["reference_crop"], size=size, form=form
        )
        self._found: Frames | None = None
        self._error: MediaError | None = None
        self._indices: dict[int, int] = {}
        self.pictures: list[Any] = []

    @property
    def frames(self) -> Frames:
        """The frames. Raises MediaError."""
        if self._error is None and self._found is None:
            try:
                self._found = self._decode()
                self.pictures = list(self._found.pictures())
            except MediaError as error:
                self._error = type(error)(f"the reference cannot be decoded: {error}")
        if self._error is not None:
            raise self._error
        assert self._found is not None
        return self._found

    def index(self, position: int) -> int:
        """Where the frame at a position is in the ladder's row, to which it is added once."""
        if position not in self._indices:
            self._indices[position] = len(self.ladder.pictures)
            self.ladder.pictures.append(self.pictures[position][0])
        return self._indices[position]


def _positions(found: list[float], wanted: list[float], near: float) -> list[int]:
    """For each wanted time, where in `found` (ascending) its frame is; -1 when it is not there."""
    times = np.array(found)
    out = []
    for time_s in wanted:
        at = int(np.abs(times - time_s).argmin())
        out.append(at if abs(times[at] - time_s) < near else -1)
    return out


def _measured(pairs: list[Any], config: Config) -> dict[str, list[float | None]]:
    """The classic measures, a list for each of their names."""
    out: dict[str, list[float | None]] = {
        name: [] for measure in config.measures for name in MEASURES[measure]
    }
    for (rgb, planes), (reference_rgb, reference_planes) in pairs:
        if planes is None or reference_planes is None:
            planes, reference_planes = planes_of_rgb(rgb), planes_of_rgb(reference_rgb)
        for name, value in fidelity(planes, reference_planes, config.measures).items():
            out[name].append(value)
    return out


class ScorePairs(score.ScoreUnits):
    """The scorer for units that are compared with a reference."""

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """All frames that are compared with one reference frame are scored together."""
        if score.stopped(self.config, self.monitor):
            return
        for index in range(batch.num_rows):
            rows = batch["outcomes"][index].as_py()
            pictures = list(score.frames_of(batch, index))
            units = [
                (pictures[first : first + len(against)], [pictures[i] for i in against], against)
                for first, against in zip(
                    batch["first"][index].as_py(), batch["against"][index].as_py(), strict=True
                )
            ]
            found = [score.timed(self._score_with, scorer, units) for scorer in self.scorers]
            total = sum(len(ours) for ours, *_ in units) or 1
            shares = [len(ours) / total for ours, *_ in units]
            yield self._finished(
                rows,
                [
                    [(scores[number], share * s) for scores, s in found]
                    for number, share in enumerate(shares)
                ],
            )

    def _score_with(self, scorer: "Scorer", units: list[Any]) -> list[Any]:
        """Scores of each unit's frames, by a model that compares or by one that does not."""
        if scorer.card.architecture.mode == "nr":
            return self._score_rows(scorer, [ours for ours, *_ in units])
        return self._score_ladder(scorer, units)

    def _score_ladder(self, scorer: "Scorer", units: list[Any]) -> list[Any]:
        """Scores of each unit's frames; when that fails, unit by unit, to find the one at fault."""
        try:
            if len(units) == 1:
                ours, theirs, _ = units[0]
                return [score.finite(scorer.score_pairs(ours, theirs)) if ours else []]
            return self._score_by_reference(scorer, units)
        except Exception as error:
            score.leave_a_lost_gpu(error)
            failed = score.as_media_error(error)
        # Not while the error is handled: it holds the memory of what was under way.
        if len(units) == 1:
            return [failed]
        return [self._score_ladder(scorer, [unit])[0] for unit in units]

    def _score_by_reference(self, scorer: "Scorer", units: list[Any]) -> list[Any]:
        """Each reference frame is looked at once, for all the frames that are compared with it."""
        out = [np.empty(len(ours), np.float32) for ours, *_ in units]
        places: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, (_, _, against) in enumerate(units):
            for position, reference in enumerate(against):
                places[reference].append((number, position))
        for shared in places.values():
            number, position = shared[0]
            frames = [units[n][0][p] for n, p in shared]
            scores = scorer.score_renditions(frames, units[number][1][position])
            for (n, p), value in zip(shared, score.finite(scores), strict=True):
                out[n][p] = value
        return out


LADDERS = score.Graph(_COLUMNS, as_ladders, decode_ladders, ScorePairs, MOST_RENDITIONS)
"""Units by the reference that they share: full-reference models."""
