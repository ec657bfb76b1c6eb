"""Which work units are done: those whose id Ray Data's checkpoint has committed.

    _checkpoint/    one Parquet file of unit ids for each write; `.pending.` until it is complete

Ray Data writes these files and leaves committed ids out of the next run. Here they are read, and
failed units are taken out of them again so that the next run has another go.
"""

from collections.abc import Collection

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import plan, schemas
from pipeline.output import Output, database

FOLDER = "_checkpoint"
_PENDING = ".pending.parquet"
_SCHEMA = pa.schema([("unit_id", pa.string())])


def recover(output: Output) -> None:
    """Remove what a killed run has left half-written. Cut short, it can be repeated.

    Ray Data does so too, but takes the mark of what is half-written away first: what it had not
    removed when it was killed itself would count as whole. Raises OutputError.
    """
    for path in output.parquet_files(FOLDER):
        if not path.endswith(_PENDING):
            continue
        write = path.rsplit("/", 1)[-1].removesuffix(_PENDING)
        whole = output.fs.exists(output.inside(FOLDER, f"{write}.parquet"))
        rows = [] if whole else output.files(f"{write}*.parquet", "frame_scores")
        rows += [] if whole else output.files(f"{write}*.parquet", "failures")
        for file in (*rows, path):
            output.remove(file)


def count_open(output: Output, model: str) -> int:
    """Planned work units of a model that are neither scored nor failed for good."""
    query = "SELECT count(*) FROM plan ANTI JOIN done USING (unit_id) WHERE code IS NULL"
    return int(_connect(output, model).execute(query).fetchall()[0][0])


def earlier_attempts(output: Output, model: str) -> dict[str, int]:
    """For open units that have failed before, how often they were tried."""
    query = """
        SELECT unit_id, max(attempt) FROM failures SEMI JOIN plan USING (unit_id)
        ANTI JOIN done USING (unit_id) WHERE stage <> 'plan' GROUP BY unit_id
    """
    return dict(_connect(output, model).execute(query).fetchall())


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
    found = _connect(output, model).execute(query, [sorted(codes)]).fetchall()
    chosen = pa.array([unit_id for (unit_id,) in found], pa.string())
    for path in _committed(output) if found else []:
        with output.fs.open(path, "rb") as file:
            ids = pq.read_table(file)
        kept = ids.filter(pc.invert(pc.is_in(ids["unit_id"], chosen)))
        if kept.num_rows == ids.num_rows:
            continue
        name = path.rsplit("/", 1)[-1]
        with output.publish(FOLDER, name) as partial:
            pq.write_table(kept, partial)
    return len(found)


def _committed(output: Output) -> list[str]:
    return [path for path in output.parquet_files(FOLDER) if not path.endswith(_PENDING)]


def _connect(output: Output, model: str) -> duckdb.DuckDBPyConnection:
    """Sees `plan` (of the model), `done`, and the complete files of `frame_scores`, `failures`."""
    pending = tuple(
        path.rsplit("/", 1)[-1].removesuffix(_PENDING)
        for path in output.parquet_files(FOLDER)
        if path.endswith(_PENDING)
    )
    connection = database()
    plans = [output.inside(*plan.table_path(model))]
    connection.register("plan", output.dataset(plans, schemas.PLAN))
    connection.register("done", output.dataset(_committed(output), _SCHEMA))
    for name in ("frame_scores", "failures"):
        files = output.parquet_files(name)
        whole = [path for path in files if not path.rsplit("/", 1)[-1].startswith(pending)]
        connection.register(name, output.dataset(whole, schemas.OUTCOME))
    return connection
