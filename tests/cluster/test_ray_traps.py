"""What Ray Data's checkpoint does in this version: the traps around which a run is built.

Each of these was measured, and the settings in `pipeline/score.py` follow from it. A test that
fails after an upgrade of Ray says that a trap has moved: look at `docs/architecture.md`, "The
commit protocol", before you change it.
"""

import collections

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig

from pipeline import cluster
from pipeline.config import Config

ROWS = 12


@pytest.fixture(scope="module", autouse=True)
def here():
    cluster.connect(Config())


@pytest.fixture
def context():
    """The context of new datasets, put back as it was."""
    context = DataContext.get_current()
    before = (context.checkpoint_config, context.max_errored_blocks)
    yield context
    context.checkpoint_config, context.max_errored_blocks = before


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"unit_id": [f"u{n:02}" for n in range(ROWS)]}), path)
    return path


def checkpointed(context, tmp_path, **options):
    options = {"delete_checkpoint_on_success": False, **options}
    context.checkpoint_config = CheckpointConfig(
        id_column="unit_id", checkpoint_path=str(tmp_path / "checkpoint"), **options
    )


def from_parquet(source):
    return ray.data.read_parquet(str(source)).repartition(target_num_rows_per_block=1)


def written(tmp_path):
    """How often each id is in the output."""
    found = collections.Counter()
    for path in (tmp_path / "out").glob("*.parquet"):
        found.update(pq.read_table(path)["unit_id"].to_pylist())
    return found


def failing_on(bad):
    def check(batch):
        if batch["unit_id"][0].as_py() in bad:
            raise ValueError("bad unit")
        return batch

    return check


def write(dataset, tmp_path, bad=(), mode="append"):
    dataset.map_batches(failing_on(bad), batch_size=1, batch_format="pyarrow").write_parquet(
        str(tmp_path / "out"), mode=mode
    )


def test_our_settings_add_nothing_when_everything_is_done(context, source, tmp_path):
    checkpointed(context, tmp_path)
    for _ in range(2):
        write(from_parquet(source), tmp_path)
    assert set(written(tmp_path).values()) == {1}
    assert len(written(tmp_path)) == ROWS


def test_a_block_with_an_error_is_not_committed_and_is_done_by_the_next_run(
    context, source, tmp_path
):
    """Why a stage may never raise: its whole block is lost, silently, until the next run."""
    checkpointed(context, tmp_path)
    context.max_errored_blocks = -1
    write(from_parquet(source), tmp_path, bad=("u03", "u07"))
    assert set(written(tmp_path)) == {f"u{n:02}" for n in range(ROWS)} - {"u03", "u07"}
    write(from_parquet(source), tmp_path)
    assert len(written(tmp_path)) == ROWS
    assert set(written(tmp_path).values()) == {1}


def test_trap_a_checkpoint_deleted_on_success_repeats_every_row(context, source, tmp_path):
    checkpointed(context, tmp_path, delete_checkpoint_on_success=True)
    for _ in range(2):
        write(from_parquet(source), tmp_path)
    assert set(written(tmp_path).values()) == {2}


def test_trap_overwrite_loses_the_rows_of_the_run_before(context, source, tmp_path):
    checkpointed(context, tmp_path)
    context.max_errored_blocks = -1
    write(from_parquet(source), tmp_path, bad=("u03", "u07"), mode="overwrite")
    write(from_parquet(source), tmp_path, mode="overwrite")
    assert set(written(tmp_path)) == {"u03", "u07"}


def test_trap_rows_that_are_not_read_from_files_are_never_left_out(context, tmp_path):
    checkpointed(context, tmp_path)
    rows = [{"unit_id": f"u{n:02}"} for n in range(ROWS)]
    for _ in range(2):
        write(ray.data.from_items(rows, override_num_blocks=4), tmp_path)
    assert set(written(tmp_path).values()) == {2}


def test_a_commit_covers_no_more_rows_than_the_plan_is_cut_into(context, source, tmp_path):
    checkpointed(context, tmp_path)
    plan = ray.data.read_parquet(str(source)).repartition(target_num_rows_per_block=5)
    write(plan, tmp_path)
    commits = [pq.read_table(p).num_rows for p in (tmp_path / "checkpoint").glob("*.parquet")]
    assert sum(commits) == ROWS
    assert max(commits) <= 5
