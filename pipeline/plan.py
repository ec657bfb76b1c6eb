"""plan: a catalog to work units.

    items: one row per item        uri, explicit, columns of the manifest
       |  probe   CPU, 1 item -> its units; decodes nothing, but for `crop: auto`
       v
    plan/: one row per work unit   schemas.PLAN + columns of the manifest

An item that cannot be planned is one row with a `code`; it becomes a row in failures/. A file
that was merely found in a folder and is not media leaves no row, and is counted.
"""

import hashlib
import json
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipeline import cluster, schemas, storage
from pipeline.catalog import Catalog
from pipeline.config import Config
from pipeline.errors import CatalogError, InternalError, MediaError
from pipeline.media import guard, probe
from pipeline.media.sample import SampleSpec, plan_samples, slice_units
from pipeline.storage import Output, Stat
from pipeline.transient import persistently
from topiq_core.weights import Weights

# Counts up when decoding, colour or sampling changes what a score is of.
SCORING_VERSION = 2
_ROWS_PER_GROUP = 8192


def item_id(uri: str) -> str:
    """Identifies an item in all tables: hexadecimal, of its URI without credentials."""
    return _digest(uri)


@dataclass
class PlanCounts:
    """What a plan holds."""

    items: int = 0
    units: int = 0
    frames: int = 0
    pixels: int = 0
    failed_items: int = 0
    skipped: int = 0
    duplicates: int = 0


def table_path(model: str) -> tuple[str, str]:
    """Where a model's plan lies in the output folder."""
    return "plan", f"{model}.parquet"


def fingerprint(config: Config, weights: Weights) -> str:
    """Identifies everything in the options that a score depends on."""
    parts = {
        "version": SCORING_VERSION,
        "weights": weights.sha256,
        "sample": config.sample,
        "alpha": config.alpha,
        "policy": asdict(config.policy),
        "precision": config.precision,
        "short_side": weights.card.short_side,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def run(
    catalog: Catalog,
    output: Output,
    config: Config,
    weights: Weights,
    shares: cluster.Shares,
    run_id: str,
) -> PlanCounts:
    """Probe every item and write plan/, and failures/ for those that cannot be planned.

    Each of the two files is replaced in one step. Returns what is in the plan.
    """
    planner = _Planner(config, weights.card.name, fingerprint(config, weights))
    schema = pa.schema([*schemas.PLAN, *catalog.extras], metadata=schemas.PLAN.metadata)
    units = ray.data.from_arrow(_chunks(catalog.table, shares)).map_batches(
        planner,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=shares.decode_cpus,
        ray_remote_args_fn=cluster.bounded_retries,
        fn_kwargs={"schema": schema},
    )
    counts = PlanCounts(duplicates=catalog.duplicates)
    model = weights.card.name
    try:
        _write(units, output, schema, model, counts, run_id, config)
    except ray.exceptions.RayError as error:
        raise cluster.run_error(error) from error
    return counts


def _write(
    units: Any,
    output: Output,
    schema: pa.Schema,
    model: str,
    counts: PlanCounts,
    run_id: str,
    config: Config,
) -> None:
    with (
        output.parquet_writer(schema, *table_path(model)) as writer,
        output.parquet_writer(schemas.OUTCOME, "failures", f"plan-{model}.parquet") as failures,
    ):
        for table in _regrouped(units.iter_batches(batch_size=None, batch_format="pyarrow")):
            planned = table.filter(pc.not_equal(table["unit_index"], -1))
            counts.skipped += table.num_rows - planned.num_rows
            _count(counts, planned)
            writer.write_table(planned.cast(schema))
            failures.write_table(_failures(planned, run_id, config))
        if counts.items == 0:
            raise CatalogError("there is no image and no video in the catalog.")


def _failures(planned: pa.Table, run_id: str, config: Config) -> pa.Table:
    """The rows of failures/ for items that could not be planned."""
    now = datetime.now(UTC)
    names = [n for n in schemas.OUTCOME.names if n in planned.column_names]
    failed = planned.filter(pc.is_valid(planned["code"])).select(names)
    common = {
        "stage": "plan", "attempt": 1, "partial": False, "n_missing": 0,
        "host": socket.gethostname(), "run_id": run_id, "started_at": now, "finished_at": now,
    }  # fmt: skip
    rows = [row | common | {"replay": config.replay(row["uri"])} for row in failed.to_pylist()]
    return pa.Table.from_pylist(rows, schema=schemas.OUTCOME)


def _chunks(table: pa.Table, shares: cluster.Shares) -> list[pa.Table]:
    """Small enough that every CPU has work, large enough that a task is worth its start."""
    rows = max(1, min(256, table.num_rows // (4 * shares.decode_tasks) or 1))
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


def _count(counts: PlanCounts, table: pa.Table) -> None:
    for row in table.select(
        ["unit_index", "times_s", "coded_width", "coded_height", "code"]
    ).to_pylist():
        counts.items += row["unit_index"] == 0
        counts.units += 1
        if row["code"] is not None:
            counts.failed_items += 1
            continue
        frames = len(row["times_s"])
        counts.frames += frames
        counts.pixels += frames * row["coded_width"] * row["coded_height"]


@dataclass(frozen=True)
class _Planner:
    """Runs on the workers. Batch of items -> batch of units, in the schema of the plan."""

    config: Config
    model: str
    fingerprint: str

    def __call__(self, items: pa.Table, schema: pa.Schema) -> pa.Table:
        rows = [unit for item in items.to_pylist() for unit in self._units(item)]
        return pa.Table.from_pylist(rows, schema=schema)

    def _units(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        uri, explicit, address = item["uri"], item.pop("explicit"), item.pop("address")
        common = {**item, "item_id": item_id(uri), "model": self.model}
        try:
            if not explicit and not self._is_media(address):
                return [{**common, "unit_id": "", "unit_index": -1, "n_units": 0}]
            return persistently(lambda: self._planned(common, address), self.config.attempts)
        except MediaError as error:
            return [self._failed(common, error)]
        except Exception as error:
            wrapped = InternalError(f"{uri}: {type(error).__name__}: {error}")
            return [self._failed(common, wrapped)]

    def _is_media(self, address: str) -> bool:
        head = persistently(lambda: storage.read_head(address), self.config.attempts)
        return probe.kind_of(head) is not None

    def _planned(self, common: dict[str, Any], address: str) -> list[dict[str, Any]]:
        config = self.config
        stat = storage.stat(address)
        spec = SampleSpec.parse(config.sample)
        decoder = guard.shared(config.decode_memory_bytes)
        found = decoder.probe(
            address, config.sample, config.max_pixels, config.decode_timeout_s, config.policy
        )
        facts = found.facts
        frame_bytes = max(1, facts.coded_width * facts.coded_height * 3)
        most = max(1, min(config.unit_frames, config.unit_bytes // frame_bytes))
        if facts.kind == "image":
            spec = SampleSpec("all")
        samples = plan_samples(spec, found.timeline)
        units = slice_units(samples, found.timeline.keyframe_times, most)
        common = common | asdict(facts) | asdict(stat)
        return [
            {
                **common,
                "unit_id": self._unit_id(common["item_id"], stat, index, unit.times),
                "unit_index": index,
                "n_units": len(units),
                "times_s": unit.times,
                "weights_s": unit.weights,
            }
            for index, unit in enumerate(units)
        ]

    def _failed(self, common: dict[str, Any], error: MediaError) -> dict[str, Any]:
        return {
            **common,
            "unit_id": self._unit_id(common["item_id"], None, 0, ()),
            "unit_index": 0,
            "n_units": 1,
            "code": error.code,
            "message": storage.redacted(str(error)),
        }

    def _unit_id(
        self, item_id: str, stat: Stat | None, index: int, times: tuple[float, ...]
    ) -> str:
        """Changes whenever the file, the options that matter, or the cut into units change."""
        return _digest(json.dumps([item_id, self.fingerprint, stat and asdict(stat), index, times]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]
