"""plan: a catalog to work units.

    items: one row per item        catalog.COLUMNS, columns of the manifest, what was known before
       |  probe   CPU, 1 item -> its units; opens each file once, and decodes
       |          nothing but for `crop: auto`
       v
    plan/: one row per work unit   schemas.PLAN + columns of the manifest

An item that is compared with a reference is matched with it here, frame by frame (`pairs`).
An item whose file is as the last plan has it is not opened again: its units are taken from there.
An item that cannot be planned is one row with a `code`; it becomes a row in failures/. A file
that was merely found in a folder and is not media leaves no row, and is counted.
"""

import functools
import hashlib
import importlib.metadata
import json
import math
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import ray
from ray.data.exceptions import ExecutionTimeoutError

from pipeline import cluster, pairs, schemas, storage
from pipeline.catalog import Catalog, digest, from_bytes
from pipeline.config import Config
from pipeline.errors import CatalogError, InternalError, MediaError, NotFound, TooLarge, Unpaired
from pipeline.media import guard, probe
from pipeline.media.align import Track
from pipeline.media.sample import Samples, SampleSpec, plan_samples, slice_units
from pipeline.monitor import Pulse
from pipeline.output import Output, database
from pipeline.storage import Stat
from pipeline.transient import persistently
from topiq_core.cards import pixels_seen
from topiq_core.weights import Weights

T = TypeVar("T")

# Counts up when decoding, colour, sampling or arithmetic changes what a score is of.
SCORING_VERSION = 7
_ROWS_PER_GROUP = 8192
# Renditions of one reference frame that are decoded, and held, together.
MOST_RENDITIONS = 8
# Marks in `unit_index` of rows that are no units: a file that is no media, an item that is as the
# last plan has it.
_SKIPPED, _UNCHANGED = -1, -2
_SIGNATURE = b"topiq_plan_signature"


@dataclass
class PlanCounts:
    """What a plan holds. gone: items of the plan before it that are in the catalog no more;
    largest_pixels: of a frame, as large as a model makes it.
    """

    items: int = 0
    units: int = 0
    frames: int = 0
    pixels: int = 0
    failed_items: int = 0
    skipped: int = 0
    duplicates: int = 0
    gone: int = 0
    largest_pixels: int = 0


def table_path(model: str) -> tuple[str, str]:
    """Where a model's plan lies in the output folder."""
    return "plan", f"{model}.parquet"


def _failures_path(model: str) -> tuple[str, str]:
    """Where the failures of a model's planning lie."""
    return "failures", f"{_FAILURES}{model}.parquet"


def is_failures(path: str) -> bool:
    """Whether a file in failures/ is of planning, and not of a write task."""
    return path.rsplit("/", 1)[-1].startswith(_FAILURES)


_FAILURES = "plan-"


def fingerprint(config: Config, weights: Weights, companions: Sequence[Weights] = ()) -> str:
    """Identifies everything in the options that a score depends on.

    companions: the other models that are scored in the same go.
    """
    parts = {
        "version": SCORING_VERSION,
        "weights": weights.sha256,
        "sample": config.sample,
        "policy": asdict(config.policy),
        "precision": config.precision,
        "short_side": weights.card.short_side,
    }
    if weights.card.architecture.mode == "fr":
        parts["pairs"] = [config.align, config.align_within_s, config.scale_to, *config.measures]
    if companions:
        parts["companions"] = [other.sha256 for other in companions]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def signature(config: Config, fingerprint: str) -> bytes:
    """Identifies everything that a plan depends on, but for the files themselves."""
    parts = {
        "fingerprint": fingerprint,
        "unit_frames": config.unit_frames,
        "unit_bytes": config.unit_bytes,
        "limits": [config.max_pixels, config.max_duration_s, config.max_file_bytes],
        "av": importlib.metadata.version("av"),
        "columns": 2,  # counts up when plans get others
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest().encode()


def run(
    catalog: Catalog,
    output: Output,
    config: Config,
    weights: Sequence[Weights],
    shares: cluster.Shares,
    run_id: str,
    monitor: Any,
) -> PlanCounts:
    """Probe every item and write plan/, and failures/ for those that cannot be planned.

    weights: of the model to plan for; the others are planned for the same frames. Each file is
    replaced in one step. Returns what is in the plan of the first.
    """
    first, *others = weights
    model, scoring = first.card.name, fingerprint(config, first, others)
    sides = tuple(one.card.short_side for one in weights if one.card.short_side is not None)
    compares, short_side = first.card.architecture.mode == "fr", first.card.short_side
    planner = _Planner(config, model, scoring, compares, sides, short_side)
    mark = {_SIGNATURE: signature(config, scoring)}
    schema = pa.schema([*schemas.PLAN, *catalog.extras], metadata=schemas.PLAN.metadata | mark)
    before = _last_plan(output, model, mark[_SIGNATURE])
    chunks = _chunks(_with_known(catalog.table, before), planner.chunk, shares)
    counts = PlanCounts(duplicates=catalog.duplicates, gone=_gone(output, model, catalog))
    try:
        with cluster.ended_when_stuck(config.no_progress_timeout_s, monitor):
            units = ray.data.from_arrow(chunks).map_batches(
                planner,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=shares.decode_cpus,
                ray_remote_args_fn=cluster.bounded_retries,
                fn_kwargs={"schema": schema, "monitor": monitor},
            )
        batches = units.iter_batches(batch_size=None, batch_format="pyarrow")
        with (
            output.parquet_writer(schema, *table_path(model)) as writer,
            output.parquet_writer(schemas.OUTCOME, *_failures_path(model)) as failures,
        ):
            for table in _merged(_regrouped(batches), before, catalog, schema, counts):
                _count(counts, table, sides)
                writer.write_table(table)
                failures.write_table(_failures(table, run_id, config, planner.compares))
            if counts.items == 0:
                raise CatalogError("there is no image and no video in the catalog.")
    except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
        raise cluster.run_error(error) from error
    for other in others:
        _write_companion(output, model, other, schema)
    return counts


def companion_id(unit_id: str, weights: Weights) -> str:
    """The unit_id under which another model's scores of the frames of a unit are kept."""
    return digest(unit_id + weights.sha256)


def _write_companion(output: Output, model: str, other: Weights, schema: pa.Schema) -> None:
    """The plan and the planning failures of a model, once more, for another one."""
    for place in (table_path(model), _failures_path(model)):
        folder, _ = place
        path = output.inside(*place)
        source = pads.dataset(path, filesystem=output.arrow_filesystem())
        # Without the mark: the next plan is made from that of the first model.
        kept = (schema if folder == "plan" else schemas.OUTCOME).with_metadata(
            schemas.OUTCOME.metadata
        )
        renamed = (table_path if folder == "plan" else _failures_path)(other.card.name)
        with output.parquet_writer(kept, *renamed) as writer:
            for batch in source.to_batches(batch_size=_ROWS_PER_GROUP):
                table = pa.Table.from_batches([batch])
                ids = [companion_id(unit_id, other) for unit_id in table["unit_id"].to_pylist()]
                changed = {"unit_id": ids, "model": [other.card.name] * len(ids)}
                for column, values in changed.items():
                    index = table.column_names.index(column)
                    field = table.schema.field(column)
                    table = table.set_column(index, field, pa.array(values, pa.string()))
                writer.write_table(table.cast(kept))


def _lying_there(output: Output, model: str) -> pads.Dataset | None:
    """The plan that lies in the output."""
    path = output.inside(*table_path(model))
    if not output.fs.exists(path):
        return None
    return pads.dataset(path, filesystem=output.arrow_filesystem())


def _last_plan(output: Output, model: str, signature: bytes) -> pads.Dataset | None:
    """The plan that lies in the output, if it was made in the same way as this one will be."""
    found = _lying_there(output, model)
    if found is None or (found.schema.metadata or {}).get(_SIGNATURE) != signature:
        return None
    return found


def _gone(output: Output, model: str, catalog: Catalog) -> int:
    """How many items of the plan that lies in the output are in the catalog no more."""
    before = _lying_there(output, model)
    if before is None:
        return 0
    connection = database()
    connection.register("known", before)
    connection.register("items", catalog.table)
    # By file: where items are compared, their ids are also of what they are compared with.
    query = "SELECT count(DISTINCT uri) FROM known ANTI JOIN items USING (uri)"
    return int(connection.sql(query).fetchall()[0][0])


_KNOWN = """
SELECT items.*, known.size_bytes AS known_size_bytes, known.mtime AS known_mtime,
       known.etag AS known_etag, known.reference_size_bytes AS known_reference_size_bytes,
       known.reference_mtime AS known_reference_mtime, known.reference_etag AS known_reference_etag
FROM items LEFT JOIN (SELECT * FROM known WHERE unit_index = 0 AND code IS NULL) known
USING (item_id) ORDER BY items.reference_uri, items.uri
"""


def _with_known(items: pa.Table, before: pads.Dataset | None) -> pa.Table:
    """The items, and beside each its file's size, time and etag as the last plan has them."""
    if before is None:
        return items
    connection = database()
    connection.register("items", items)
    connection.register("known", before)
    return connection.sql(_KNOWN).to_arrow_table()


def _merged(
    tables: Iterator[pa.Table],
    before: pads.Dataset | None,
    catalog: Catalog,
    schema: pa.Schema,
    counts: PlanCounts,
) -> Iterator[pa.Table]:
    """What the workers found, without their marks, then the units of items that are unchanged."""
    unchanged: list[pa.ChunkedArray] = []
    for table in tables:
        marks = table["unit_index"]
        counts.skipped += pc.sum(pc.equal(marks, _SKIPPED)).as_py() or 0
        unchanged.append(table.filter(pc.equal(marks, _UNCHANGED))["item_id"])
        yield table.filter(pc.greater_equal(marks, 0)).cast(schema)
    if before is None or not any(map(len, unchanged)):
        return
    columns = [f'known."{name}"' for name in schemas.PLAN.names]
    columns += [f"items.{_quoted(field.name)}" for field in catalog.extras]
    connection = database()
    ids = pa.chunked_array(unchanged, pa.string())
    connection.register("unchanged", pa.table({"item_id": ids}))
    connection.register("known", before)
    connection.register("items", catalog.table)
    query = (
        f"SELECT {', '.join(columns)} FROM known JOIN items USING (item_id) SEMI JOIN unchanged "
        "USING (item_id) ORDER BY known.reference_uri, known.uri, known.unit_index"
    )
    for batch in connection.sql(query).to_arrow_reader(_ROWS_PER_GROUP):
        yield pa.Table.from_batches([batch]).cast(schema)


def _quoted(name: str) -> str:
    """A column's name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def _failures(planned: pa.Table, run_id: str, config: Config, compares: bool) -> pa.Table:
    """The rows of failures/ for items that could not be planned."""
    now = datetime.now(UTC)
    names = [n for n in schemas.OUTCOME.names if n in planned.column_names]
    failed = planned.filter(pc.is_valid(planned["code"])).select(names)
    common = {
        "stage": "plan", "attempt": 1, "partial": False, "n_missing": 0,
        "host": socket.gethostname(), "run_id": run_id, "started_at": now, "finished_at": now,
    }  # fmt: skip
    rows = [
        row
        | common
        | {"replay": config.replay(row["uri"], row["reference_uri"] if compares else None)}
        for row in failed.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=schemas.OUTCOME)


def _chunks(table: pa.Table, most: int, shares: cluster.Shares) -> list[pa.Table]:
    """Small enough that every CPU has work, large enough that a task is worth its start."""
    rows = max(1, min(most, table.num_rows // (4 * shares.decode_tasks) or 1))
    return [table.slice(start, rows) for start in range(0, table.num_rows, rows)]


def _regrouped(batches: Any) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for batch in batches:
        waiting.append(batch)
        if sum(t.num_rows for t in waiting) >= _ROWS_PER_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _count(counts: PlanCounts, table: pa.Table, short_sides: Sequence[int]) -> None:
    for row in table.select(
        ["unit_index", "times_s", "coded_width", "coded_height", "code"]
    ).to_pylist():
        counts.items += row["unit_index"] == 0
        counts.units += 1
        if row["code"] is not None:
            counts.failed_items += 1
            continue
        width, height = row["coded_width"], row["coded_height"]
        frames, pixels = len(row["times_s"]), width * height
        counts.frames += frames
        counts.pixels += frames * pixels
        scales = [max(1, side / max(1, min(width, height))) for side in short_sides]
        enlarged = math.ceil(pixels * max(scales, default=1) ** 2)
        counts.largest_pixels = max(counts.largest_pixels, enlarged)


@dataclass(frozen=True)
class _Planner:
    """Runs on the workers. Batch of items -> batch of units, in the schema of the plan."""

    config: Config
    model: str
    fingerprint: str
    compares: bool
    short_sides: tuple[int, ...] = ()
    """To which models bring pictures before they look."""
    short_side: int | None = None
    """That of the first model."""

    @property
    def chunk(self) -> int:
        """Most items of a task."""
        whole_files = self.compares or SampleSpec.parse(self.config.sample).needs_frame_times
        return 16 if whole_files else 128

    def __call__(self, items: pa.Table, schema: pa.Schema, monitor: Any) -> pa.Table:
        references, pulse = _References(self.config), Pulse(monitor)
        rows = []
        for item in items.to_pylist():
            rows += self._units(item, references)
            pulse.beat()
        return pa.Table.from_pylist(rows, schema=schema)

    def _units(self, item: dict[str, Any], references: "_References") -> list[dict[str, Any]]:
        renditions = item.pop("renditions")
        uri, explicit, unpaired = item["uri"], item.pop("explicit"), item.pop("unpaired")
        address = from_bytes(item.pop("address"))
        against = item.pop("reference_address")
        reference = from_bytes(against) if against and self.compares else None
        known, known_reference = _stat(item, "known_"), _stat(item, "known_reference_")
        listed = _stat(item, "")
        common = {**item, "model": self.model}
        try:
            if unpaired and self.compares:
                raise Unpaired(f"{uri}: {unpaired}")
            stat = listed or persistently(lambda: storage.stat(address), self.config.attempts)
            if reference is not None:
                with _naming_the_reference(uri):
                    reference_stat = references.stat(reference)
                if known is not None and (known, known_reference) == (stat, reference_stat):
                    return [_mark(common, _UNCHANGED)]
                return self._pair_units(common, (address, stat), reference, references, renditions)
            if known == stat:
                return [_mark(common, _UNCHANGED)]
            if not explicit and not self._is_media(address):
                return [_mark(common, _SKIPPED)]
            return persistently(lambda: self._planned(common, address, stat), self.config.attempts)
        except MediaError as error:
            if isinstance(error, NotFound) and not explicit:  # as of an upload that is done by now
                return [_mark(common, _SKIPPED)]
            return [self._failed(common, error)]
        except Exception as error:
            wrapped = InternalError(f"{uri}: {type(error).__name__}: {error}")
            return [self._failed(common, wrapped)]

    def _is_media(self, address: str) -> bool:
        head = persistently(lambda: storage.read_head(address), self.config.attempts)
        return probe.kind_of(head) is not None

    def _planned(self, common: dict[str, Any], address: str, stat: Stat) -> list[dict[str, Any]]:
        config = self.config
        found = _probed(address, stat, config.sample, config)
        facts = found.facts
        self._check_enlarged(address, facts)
        spec = SampleSpec.parse(config.sample)
        frame_bytes = max(1, facts.coded_width * facts.coded_height * 3)
        most = max(1, min(config.unit_frames, config.unit_bytes // frame_bytes))
        if facts.kind == "image":
            spec = SampleSpec("all")
        samples = plan_samples(spec, found.timeline)
        units = slice_units(samples, found.timeline.keyframe_times, most)
        common = common | asdict(facts) | asdict(stat) | {"scored_pixels": self._seen(facts)}
        return [
            self._row(common, len(units), index, unit, (stat,)) for index, unit in enumerate(units)
        ]

    def _seen(self, facts: probe.Facts) -> int:
        return pixels_seen(facts.coded_height, facts.coded_width, self.short_side)

    def _check_enlarged(self, address: str, facts: probe.Facts) -> None:
        """Raises TooLarge for what would be when a model has brought it to its size."""
        width, height = facts.coded_width, facts.coded_height
        for side in self.short_sides:
            scale = side / max(1, min(width, height))
            if width * height * scale**2 > self.config.max_pixels:
                raise TooLarge(
                    f"{address}: {width}x{height}, which the model brings to a shorter side of "
                    f"{side} pixels, is over the limit of {self.config.max_pixels} then. Raise "
                    "max_pixels if there is memory for it."
                )

    def _pair_units(
        self,
        common: dict[str, Any],
        ours: tuple[str, Stat],
        reference: str,
        references: "_References",
        renditions: int,
    ) -> list[dict[str, Any]]:
        """Units of an item that is compared: each with the reference frames that it needs."""
        config, uri = self.config, common["uri"]
        address, stat = ours
        with _naming_the_reference(uri):
            against, reference_stat = references.probed(reference), references.stat(reference)
        found = persistently(lambda: _probed(address, stat, "all", config), config.attempts)
        pairs.same_kind(uri, found, against)
        for place, probed in ((address, found), (reference, against)):
            self._check_enlarged(place, probed.facts)
        timelines = found.timeline, against.timeline
        if config.align == "auto" and found.facts.kind == "video":
            sides = (address, found.timeline), (reference, against.timeline)
            offset = pairs.offset_by_pictures(uri, sides, config.align_within_s, references.watch)
        else:
            offset = pairs.offset_by_start(*timelines)
        still = found.facts.kind == "image"
        spec = SampleSpec("all") if still else SampleSpec.parse(config.sample)
        rule: Literal["time", "number"] = "number" if still or config.align == "none" else "time"
        chosen = pairs.pair_frames(uri, spec, *timelines, offset.seconds, rule)
        sizes = [f.coded_width * f.coded_height for f in (found.facts, against.facts)]
        together = 1 + min(renditions, MOST_RENDITIONS)
        frame_bytes = max(1, 3 * max(sizes) * together)
        most = max(1, min(config.unit_frames, config.unit_bytes // frame_bytes))
        units = slice_units(chosen.samples, (), most)
        estimate = offset.estimate
        scored = against if config.scale_to == "reference" else found
        common = common | asdict(found.facts) | asdict(stat) | {
            "offset_s": None if config.align == "none" else offset.seconds,
            "similarity": estimate and estimate.similarity,
            "confidence": estimate and estimate.confidence,
            "n_matched": chosen.n_matched,
            "n_unmatched": chosen.n_unmatched,
            "scored_pixels": self._seen(scored.facts),
            "crop": pairs.common_crop(found.facts, against.facts),
            "reference_crop": against.facts.crop,
            **{f"reference_{name}": value for name, value in asdict(reference_stat).items()},
        }  # fmt: skip
        rows, begin = [], 0
        for index, unit in enumerate(units):
            end = begin + len(unit.times)
            times = chosen.reference_times[begin:end]
            begin = end
            row = self._row(common, len(units), index, unit, (stat, reference_stat), times)
            ladder = [common["reference_uri"], asdict(reference_stat), index]
            rows.append(row | {"reference_times_s": times, "ladder_id": digest(json.dumps(ladder))})
        return rows

    def _row(
        self,
        common: dict[str, Any],
        n_units: int,
        index: int,
        unit: Samples,
        stats: tuple[Stat, ...],
        reference_times: tuple[float, ...] = (),
    ) -> dict[str, Any]:
        """A unit. Its id changes whenever a file, the options that matter, or the cut into units
        change.
        """
        made_of = [common["item_id"], self.fingerprint, *map(asdict, stats), index, unit.times]
        return {
            **common,
            "unit_id": digest(json.dumps([*made_of, *reference_times])),
            "unit_index": index,
            "n_units": n_units,
            "times_s": unit.times,
            "weights_s": unit.weights,
        }

    def _failed(self, common: dict[str, Any], error: MediaError) -> dict[str, Any]:
        return {
            **common,
            "unit_id": digest(json.dumps([common["item_id"], self.fingerprint])),
            "unit_index": 0,
            "n_units": 1,
            "code": error.code,
            "message": storage.redacted(str(error)),
        }


def _probed(address: str, stat: Stat, sample: str, config: Config) -> probe.Probe:
    """What the guarded decoder finds out of a file. Raises MediaError, also for its limits."""
    if (stat.size_bytes or 0) > config.max_file_bytes:
        raise TooLarge(
            f"{address}: {stat.size_bytes} bytes, over the limit of {config.max_file_bytes}. "
            "Raise max_file_bytes if that is meant."
        )
    decoder = guard.shared(config.decode_memory_bytes)
    found = decoder.probe(
        address, sample, config.max_pixels, config.decode_timeout_s, config.policy
    )
    if found.timeline.duration_s > config.max_duration_s:
        raise TooLarge(
            f"{address}: {found.timeline.duration_s:.0f} s by its header, over the limit of "
            f"{config.max_duration_s:.0f}. Raise max_duration_s if it is really so long."
        )
    return found


class _References:
    """What is known of references in one batch of items, where renditions share them.

    Errors too: a reference that hangs is waited for once, not for every rendition.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._probe = functools.lru_cache(maxsize=4)(functools.partial(_tried, self._probed))
        self._watch = functools.lru_cache(maxsize=4)(functools.partial(_tried, self._tracked))
        self._state = functools.lru_cache(maxsize=4)(functools.partial(_tried, self._stat))

    def stat(self, address: str) -> Stat:
        """Size, time and etag. Raises MediaError."""
        return _had(self._state(address))

    def probed(self, address: str) -> probe.Probe:
        """Facts, and the times of all frames. Raises MediaError."""
        return _had(self._probe(address))

    def watch(self, address: str, times: list[float]) -> Track:
        """What alignment sees of some frames. Raises MediaError."""
        return _had(self._watch(address, tuple(times)))

    def _stat(self, address: str) -> Stat:
        return persistently(lambda: storage.stat(address), self.config.attempts)

    def _probed(self, address: str) -> probe.Probe:
        stat = self.stat(address)
        return persistently(
            lambda: _probed(address, stat, "all", self.config), self.config.attempts
        )

    def _tracked(self, address: str, times: tuple[float, ...]) -> Track:
        config = self.config
        decoder = guard.shared(config.decode_memory_bytes)
        return persistently(
            lambda: decoder.track(address, list(times), config.max_pixels, config.decode_timeout_s),
            config.attempts,
        )


def _tried(work: Callable[..., T], *given: Any) -> T | MediaError:
    """What comes of a call, or the MediaError that it raises."""
    try:
        return work(*given)
    except MediaError as error:
        return error


def _had(found: T | MediaError) -> T:
    """A result of `_tried`. Raises the MediaError that it is."""
    if isinstance(found, MediaError):
        raise found
    return found


@contextmanager
def _naming_the_reference(uri: str) -> Iterator[None]:
    """Errors of a reference become errors of the item that is compared with it."""
    try:
        yield
    except MediaError as error:
        raise type(error)(f"{uri}: its reference cannot be used: {error}") from error


def _stat(item: dict[str, Any], prefix: str) -> Stat | None:
    """Takes size, time and etag out of an item's row; None when they are not known."""
    size, mtime, etag = (item.pop(prefix + f.name, None) for f in fields(Stat))
    return None if size is None else Stat(size, mtime, etag)


def _mark(common: dict[str, Any], kind: int) -> dict[str, Any]:
    """A row that is no unit."""
    return {**common, "unit_id": "", "unit_index": kind, "n_units": 0}
