"""aggregate: what became of the units, to one row per item.

    plan/ + frame_scores/ + failures/ --(DuckDB join, streamed)--> scores/

scores/ is derived: it can be rebuilt at any time, and is replaced in one step.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from pipeline import plan as plan_step
from pipeline import pooling, schemas
from pipeline.errors import ConfigError, OutputError, RunError
from pipeline.storage import Output

_ITEMS_PER_BATCH = 512

# One row per item: its plan, its units' frames in order, and how many units failed. Units of
# earlier plans (changed files, other options) are in frame_scores/ too; the join leaves them out.
# A failure counts until its unit is scored after all; of several, the last one.
_QUERY = """
WITH last_failures AS (
    SELECT unit_id, code, message
    FROM failures ANTI JOIN frame_scores USING (unit_id)
    QUALIFY row_number() OVER (PARTITION BY unit_id ORDER BY finished_at DESC) = 1
),
outcomes AS (
    SELECT unit_id, pts_s, score, weight_s, partial, n_missing, message, frame, run_id,
           psnr_y, psnr_weighted, ssim, ms_ssim, NULL AS code
    FROM frame_scores
    UNION ALL BY NAME
    SELECT * FROM last_failures
),
items AS (
    SELECT
        p.item_id,
        count(DISTINCT p.unit_id) AS n_units,
        count(DISTINCT o.unit_id) AS n_known,
        count(o.unit_id) AS n_outcomes,
        count(o.code) AS n_units_failed,
        flatten(list(o.pts_s ORDER BY p.unit_index) FILTER (o.score IS NOT NULL)) AS pts_s,
        flatten(list(o.score ORDER BY p.unit_index) FILTER (o.score IS NOT NULL)) AS frame_score,
        flatten(list(o.weight_s ORDER BY p.unit_index) FILTER (o.score IS NOT NULL)) AS weight_s,
        {measures},
        bool_or(coalesce(o.partial, false)) OR count(o.code) > 0 AS partial,
        sum(coalesce(o.n_missing, 0)) AS n_missing,
        first(o.message ORDER BY p.unit_index) FILTER (o.message IS NOT NULL) AS message,
        first(o.frame ORDER BY p.unit_index) FILTER (o.frame IS NOT NULL) AS form,
        first(o.code ORDER BY p.unit_index) FILTER (o.code IS NOT NULL) AS code,
        max(o.run_id) AS run_id
    FROM plan p LEFT JOIN outcomes o USING (unit_id)
    GROUP BY p.item_id
)
SELECT head.* EXCLUDE (n_units, message, code, times_s, weights_s), items.* EXCLUDE (item_id)
FROM plan head JOIN items USING (item_id)
WHERE head.unit_index = 0
ORDER BY head.uri, head.reference_uri
""".replace(
    "{measures}",
    ",\n        ".join(
        f"flatten(list(o.{name} ORDER BY p.unit_index) FILTER (o.score IS NOT NULL)) AS {name}"
        for name in schemas.MEASURES
    ),
)


@dataclass
class Counts:
    """Items by their fate. Lost units are neither scored nor failed, repeated ones twice."""

    scored: int = 0
    partial: int = 0
    failed: int = 0
    lost_units: int = 0
    repeated_units: int = 0
    frames: int = 0
    failed_by_code: Counter[str] = field(default_factory=Counter)

    @property
    def items(self) -> int:
        """All items of the plan."""
        return self.scored + self.failed


def run(output: Output, model: str, names: tuple[str, ...]) -> Counts:
    """Rebuild scores/ for a model. Raises OutputError (no plan) and RunError (units lost)."""
    connection = _connect(output, model)
    extras = [f for f in _plan(output, model).schema if f.name not in schemas.PLAN.names]
    schema = schemas.scores(names, extras)
    counts = Counts()
    reader = connection.sql(_QUERY).to_arrow_reader(_ITEMS_PER_BATCH)
    with output.parquet_writer(schema, "scores", f"{model}.parquet") as writer:
        for batch in reader:
            rows = list(_item_rows(batch.to_pylist(), names, counts))
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        if counts.lost_units:
            raise RunError(
                f"{counts.lost_units} planned work units are neither scored nor failed: the run "
                "did not finish. The same command goes on where it stopped."
            )
        if counts.repeated_units:
            raise RunError(
                f"{counts.repeated_units} work units are in frame_scores/ more than once. This "
                "must not happen: please report it. Score into another output."
            )
    return counts


def planning_failures(output: Output, model: str) -> list[tuple[str, str, str]]:
    """(uri, code, message) of the items that could not be planned."""
    connection = duckdb.connect()
    connection.register("plan", _plan(output, model))
    query = "SELECT uri, code, message FROM plan WHERE code IS NOT NULL ORDER BY uri"
    rows: list[tuple[str, str, str]] = connection.execute(query).fetchall()
    return rows


def planned_models(output: Output) -> list[str]:
    """Models that have a plan in the output folder. Raises OutputError when there is none."""
    names = [PurePosixPath(path).stem for path in output.parquet_files("plan")]
    if not names:
        raise OutputError(f"{output.url}: no plan in it. Run `topiq score` first.")
    return names


def scores(output: Output, model: str | None) -> pads.Dataset:
    """scores/ of a model, or of the only one there is. Raises OutputError and ConfigError."""
    files = output.parquet_files("scores")
    if model is not None:
        files = [f for f in files if PurePosixPath(f).stem == model]
    if not files:
        raise OutputError(f"{output.url}: no scores{f' of {model}' if model else ''} in it.")
    if len(files) > 1:
        names = ", ".join(PurePosixPath(f).stem for f in files)
        raise ConfigError(f"{output.url} holds scores of {names}: choose one with --model.")
    return pads.dataset(files, filesystem=output.arrow_filesystem())


def _plan(output: Output, model: str) -> pads.Dataset:
    path = output.inside(*plan_step.table_path(model))
    if not output.fs.exists(path):
        raise OutputError(f"{output.url}: no plan for {model} in it. Run `topiq score` first.")
    return pads.dataset(path, filesystem=output.arrow_filesystem())


def _connect(output: Output, model: str) -> duckdb.DuckDBPyConnection:
    """A connection that sees `plan` (of the model), `frame_scores` and `failures`."""
    connection = duckdb.connect()
    connection.register("plan", _plan(output, model))
    for name in ("frame_scores", "failures"):
        connection.register(name, output.dataset(output.parquet_files(name), schemas.OUTCOME))
    return connection


def _item_rows(
    items: list[dict[str, Any]], names: tuple[str, ...], counts: Counts
) -> Iterator[dict[str, Any]]:
    for item in items:
        counts.lost_units += item["n_units"] - item["n_known"]
        counts.repeated_units += item["n_outcomes"] - item["n_known"]
        if not item["frame_score"]:
            counts.failed += 1
            counts.failed_by_code[item["code"] or "lost"] += 1
            continue
        counts.scored += 1
        counts.partial += item["partial"]
        yield _item_row(item, names, counts)


def _item_row(item: dict[str, Any], names: tuple[str, ...], counts: Counts) -> dict[str, Any]:
    frames = _in_order(item)
    counts.frames += len(frames.scores)
    form = item["form"] or {}
    return {
        **item,
        **pooling.pool(frames, names),
        "n_frames": len(frames.scores),
        **{name: _mean(item[name], item["weight_s"]) for name in schemas.MEASURES},
        **{k: v for k, v in form.items() if v is not None},
    }


def _mean(values: list[float | None] | None, weights: list[float]) -> float | None:
    """Over time; null when the measure was not asked for, or not defined."""
    known = [(v, w) for v, w in zip(values or [], weights, strict=False) if v is not None]
    if not known:
        return None
    return float(np.average([v for v, _ in known], weights=[w for _, w in known]))


def _in_order(item: dict[str, Any]) -> pooling.Frames:
    """The item's frames by time. One on screen across a cut between units comes once."""
    times = np.asarray(item["pts_s"], dtype=np.float64)
    weights = np.asarray(item["weight_s"], dtype=np.float64)
    scores = np.asarray(item["frame_score"], dtype=np.float64)
    unique, first, inverse = np.unique(times, return_index=True, return_inverse=True)
    return pooling.Frames(
        unique, np.bincount(inverse, weights=weights).astype(np.float64), scores[first]
    )
