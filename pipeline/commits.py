"""Which work units are done: those whose id Ray Data's checkpoint has committed.

    _checkpoint/    one Parquet file of unit ids for each write; `.pending.` until it is complete
    frame_scores/, failures/    the rows of a write, in files named after it

Ray Data writes these files and leaves committed ids out of the next run. Here they are read, and
failed units are taken out of them again so that the next run has another go.
"""

import itertools
from collections.abc import Collection
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import plan, schemas
from pipeline.errors import OutputError
from pipeline.output import Output, database

if TYPE_CHECKING:
    import duckdb

FOLDER = "_checkpoint"
_PENDING = ".pending.parquet"
_SCHEMA = pa.schema([("unit_id", pa.string())])


def recover(output: Output) -> None:
    """Remove what a killed run has left half-written. Cut short, it can be repeated.

    A write counts that has both its rows and its commit. Rows without one are of a task that was
    killed, or that was under way when the run that it was of had ended already; a commit without
    rows is of a task whose rows were removed meanwhile. Raises OutputError.
    """
    marks, rows = output.parquet_files(FOLDER), _rows(output)
    if rows and not marks:
        raise OutputError(
            f"{output.url}: there are scores, but nothing in {FOLDER}/ to say which are complete. "
            "If this is a copy, copy that folder too; otherwise name another output."
        )
    committed = {_write(path) for path in marks if not path.endswith(_PENDING)}
    written = {_write(path) for path in rows}
    # Rows first: they are found again by what is left of the marks.
    for path in rows:
        if _write(path) not in committed:
            output.remove(path)
    for path in marks:
        if path.endswith(_PENDING) or _write(path) not in written:
            output.remove(path)


def count_open(output: Output, model: str) -> int:
    """Planned work units of a model that are neither scored nor failed for good."""
    query = "SELECT count(*) FROM plan ANTI JOIN done USING (unit_id) WHERE code IS NULL"
    return int(_connect(output, model).execute(query).fetchall()[0][0])


def open_work(output: Output, model: str) -> tuple[int, int]:
    """Frames, and pixels of frames as the model sees them, of the work units that are open."""
    query = """
        SELECT sum(len(times_s)), sum(len(times_s) * scored_pixels)
        FROM plan ANTI JOIN done USING (unit_id) WHERE code IS NULL
    """
    ((frames, pixels),) = _connect(output, model).execute(query).fetchall()
    return int(frames or 0), int(pixels or 0)


def earlier_attempts(output: Output, model: str) -> dict[str, int]:
    """For open units that have failed before, how often they were tried."""
    query = """
        SELECT unit_id, max(attempt) FROM failures SEMI JOIN plan USING (unit_id)
        ANTI JOIN done USING (unit_id) WHERE stage <> 'plan' GROUP BY unit_id
    """
    return dict(_connect(output, model, "failures").execute(query).fetchall())


def reopen(output: Output, model: str, codes: Collection[str]) -> int:
    """Make units whose last failure has one of `codes` open again. Returns how many.

    Their rows stay in failures/ as history. A file at a time is replaced, in one step each: cut
    short, this has reopened some units, and can be repeated.
    """
    query = """
        SELECT unit_id FROM failures SEMI JOIN plan USING (unit_id) SEMI JOIN done USING (unit_id)
        ANTI JOIN frame_scores USING (unit_id)
        QUALIFY row_number() OVER (PARTITION BY unit_id ORDER BY finished_at DESC) = 1
            AND list_contains(?, code)
    """
    connection = _connect(output, model, "frame_scores", "failures")
    return _taken_out(output, connection.execute(query, [sorted(codes)]))


def reopen_lost(output: Output, model: str) -> int:
    """Make units open again that count as done but have no row, as tables were removed.

    Returns how many. As `reopen`, it can be repeated.
    """
    query = """
        SELECT unit_id FROM plan SEMI JOIN done USING (unit_id)
        ANTI JOIN frame_scores USING (unit_id) ANTI JOIN failures USING (unit_id)
    """
    connection = _connect(output, model, "frame_scores", "failures")
    return _taken_out(output, connection.execute(query))


def _taken_out(output: Output, found: "duckdb.DuckDBPyConnection") -> int:
    """Take units out of the commits: those that a query has found."""
    ids = [unit_id for (unit_id,) in found.fetchall()]
    chosen = pa.array(ids, pa.string())
    for path in _committed(output) if ids else []:
        with output.fs.open(path, "rb") as file:
            table = pq.read_table(file)
        kept = table.filter(pc.invert(pc.is_in(table["unit_id"], chosen)))
        if kept.num_rows == table.num_rows:
            continue
        name = path.rsplit("/", 1)[-1]
        with output.publish(FOLDER, name) as partial:
            pq.write_table(kept, partial)
    return len(ids)


def _committed(output: Output) -> list[str]:
    return [path for path in output.parquet_files(FOLDER) if not path.endswith(_PENDING)]


def _rows(output: Output) -> list[str]:
    """Files that write tasks have written; not those of planning."""
    files = itertools.chain(*(output.parquet_files(name) for name in ("frame_scores", "failures")))
    return [path for path in files if not plan.is_failures(path)]


def _write(path: str) -> str:
    """Which write a file is of: `WRITE.parquet`, `WRITE.pending.parquet` or `WRITE-N.parquet`."""
    name = path.rsplit("/", 1)[-1].removesuffix(".parquet").removesuffix(".pending")
    return name.rsplit("-", 1)[0]


_COLUMNS = {
    "frame_scores": ["unit_id"],
    "failures": ["unit_id", "attempt", "stage", "code", "finished_at"],
}


def _connect(output: Output, model: str, *outcomes: str) -> "duckdb.DuckDBPyConnection":
    """Sees `plan` (of the model), `done`, and the complete files of tables of outcomes.

    Those can be read once.
    """
    committed = _committed(output)
    connection = database()
    plans = [output.inside(*plan.table_path(model))]
    connection.register("plan", output.dataset(plans, schemas.PLAN))
    connection.register("done", output.dataset(committed, _SCHEMA))
    writes = {_write(path) for path in committed} if outcomes else set()
    for name in outcomes:
        files = output.parquet_files(name)
        whole = [path for path in files if plan.is_failures(path) or _write(path) in writes]
        connection.register(name, output.scan(whole, schemas.OUTCOME, _COLUMNS[name]))
    return connection
