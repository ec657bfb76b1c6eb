"""aggregate: what became of the units, to one row per item.

    plan/ + frame_scores/ + failures/ --(DuckDB join, streamed)--> scores/

scores/ is derived: it can be rebuilt at any time, and is replaced in one step.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from pipeline import plan as plan_step
from pipeline import pooling, schemas
from pipeline.errors import ConfigError, LostUnits, OutputError, RunError
from pipeline.output import Output, database

_ROWS_PER_BATCH = 512

# Every unit with what became of it, those of an item together and in order. Units of earlier plans
# (changed files, other options) are in frame_scores/ too; the join leaves them out.
# Sorted and not grouped: DuckDB sorts in bounded memory, while an ordered list for each of a dozen
# columns costs it 60 kB an item. Each table is read once: they come from readers.
# A row is named like no column of a manifest can be: SQL would take the column for it.
_QUERY = """
SELECT p.* EXCLUDE (code, message, times_s, weights_s), score_row
FROM plan p LEFT JOIN (FROM frame_scores UNION ALL FROM failures) score_row USING (unit_id)
ORDER BY p.uri, p.reference_uri, p.item_id, p.unit_index
"""
_OUTCOME_COLUMNS = [
    "unit_id", "code", "message", "finished_at", "run_id", "partial", "n_missing", "frame",
    "pts_s", "score", "weight_s", *schemas.MEASURES,
]  # fmt: skip
_BY_FRAME = ("pts_s", "score", "weight_s", *schemas.MEASURES)


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
    """Rebuild scores/ for a model. Raises OutputError (no plan, or a damaged table) and RunError
    (units lost).
    """
    with output.reading():
        return _run(output, model, names)


def _run(output: Output, model: str, names: tuple[str, ...]) -> Counts:
    connection = _connect(output, model)
    extras = [f for f in _plan(output, model).schema if f.name not in schemas.PLAN.names]
    schema = schemas.scores(names, extras)
    errors = _model_errors(output, model)
    counts = Counts()
    reader = connection.sql(_QUERY).to_arrow_reader(_ROWS_PER_BATCH)
    units = (row for batch in reader for row in batch.to_pylist())
    items = (list(of) for _, of in itertools.groupby(units, lambda row: row["item_id"]))
    with output.parquet_writer(schema, "scores", f"{model}.parquet") as writer:
        while some := list(itertools.islice(items, _ROWS_PER_BATCH)):
            rows = list(_item_rows(map(_joined, some), names, counts))
            for row in rows:
                row["score_model_se"] = errors.get(row["run_id"])
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        if counts.lost_units:
            raise LostUnits(
                f"{counts.lost_units} planned work units are neither scored nor failed: the run "
                "did not finish, or tables of it were removed. The command of the run goes on "
                "with them."
            )
        if counts.repeated_units:
            raise RunError(
                f"{counts.repeated_units} work units are in frame_scores/ more than once. This "
                "must not happen: please report it. Score into another output."
            )
    return counts


MODEL_ERROR = "rmse"
"""What a run's record says of a model's error on rated pictures that it had not seen, or null."""


def _model_errors(output: Output, model: str) -> dict[str, float | None]:
    """By run, how far the model is off by what its card said then."""
    out: dict[str, float | None] = {}
    for path in output.files("*.json", "runs"):
        try:
            record = json.loads(output.fs.read_text(path, encoding="utf-8"))
        except ValueError as error:
            raise OutputError(
                f"{path}: this record of a run is damaged. Remove it: `score_model_se` of what "
                "that run scored is null then."
            ) from error
        for weights in (record["weights"], *record.get("companions", ())):
            if weights["model"] == model:
                out[record["run_id"]] = weights.get(MODEL_ERROR)
    return out


def planning_failures(output: Output, model: str) -> list[tuple[str, str, str]]:
    """(uri, code, message) of the items that could not be planned."""
    connection = database()
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
    """A connection that sees `plan` (of the model), and what it needs of the outcomes."""
    connection = database()
    connection.register("plan", _plan(output, model))
    for name in ("frame_scores", "failures"):
        rows = output.scan(output.parquet_files(name), schemas.OUTCOME, _OUTCOME_COLUMNS)
        connection.register(name, rows)
    return connection


def _joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """An item of its units' rows, in order: what the plan says of it, and all its frames."""
    units = [list(of) for _, of in itertools.groupby(rows, lambda row: row["unit_id"])]
    known = [outcomes for outcomes in map(_settled, units) if outcomes]
    outcomes = list(itertools.chain.from_iterable(known))
    scored = [outcome for outcome in outcomes if outcome["score"] is not None]

    def first(name: str) -> Any:
        return next((o[name] for o in outcomes if o[name] is not None), None)

    by_frame = {name: [v for o in scored for v in o[name] or ()] for name in _BY_FRAME}
    return {
        **rows[0],
        **by_frame,
        "frame_score": by_frame["score"],
        "n_units": len(units),
        "n_known": len(known),
        "n_outcomes": len(outcomes),
        "n_units_failed": sum(o["code"] is not None for o in outcomes),
        "partial": any(o["partial"] or o["code"] is not None for o in outcomes),
        "n_missing": sum(o["n_missing"] for o in scored),
        "message": first("message"),
        "form": first("frame"),
        "code": first("code"),
        "run_id": max((o["run_id"] for o in scored), default=None),
    }


def _settled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What counts of a unit's outcomes: its scores, or as long as there are none its last failure.

    More than one with scores are a fault, and are all counted.
    """
    outcomes = [row["score_row"] for row in rows if row["score_row"]["unit_id"] is not None]
    scored = [outcome for outcome in outcomes if outcome["score"] is not None]
    epoch = datetime.min.replace(tzinfo=UTC)
    return scored or sorted(outcomes, key=lambda o: o["finished_at"] or epoch)[-1:]


def _item_rows(
    items: Iterable[dict[str, Any]], names: tuple[str, ...], counts: Counts
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
    if (np.diff(times) > 0).all():
        return pooling.Frames(times, weights, scores)
    unique, first, inverse = np.unique(times, return_index=True, return_inverse=True)
    return pooling.Frames(
        unique, np.bincount(inverse, weights=weights).astype(np.float64), scores[first]
    )
