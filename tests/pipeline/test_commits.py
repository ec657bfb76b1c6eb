"""What a killed run leaves half-written is removed, also by a run that is killed at it."""

import pytest

from pipeline import commits
from pipeline.errors import OutputError
from pipeline.output import Output


def lay(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def left(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*.parquet")}


WHOLE = {"_checkpoint/w2_0.parquet", "frame_scores/w2_0-0.parquet", "failures/w2_0-0.parquet"}
HALF = {"_checkpoint/w1_0.pending.parquet", "frame_scores/w1_0-0.parquet"}


def test_rows_that_were_not_committed_go_and_the_others_stay(tmp_path):
    lay(tmp_path, *WHOLE, *HALF)
    commits.recover(Output(str(tmp_path)))
    assert left(tmp_path) == WHOLE


def test_a_commit_that_was_copied_and_not_yet_moved_counts(tmp_path):
    lay(tmp_path, *WHOLE, "_checkpoint/w2_0.pending.parquet")
    commits.recover(Output(str(tmp_path)))
    assert left(tmp_path) == WHOLE


def test_recovery_that_breaks_off_can_be_repeated(tmp_path, monkeypatch):
    lay(tmp_path, *WHOLE, *HALF)
    output = Output(str(tmp_path))
    with monkeypatch.context() as broken:

        def refuse(path):
            raise OSError(5, "Input/output error", path)

        broken.setattr(output.fs, "rm_file", refuse)
        with pytest.raises(OutputError, match="w1_0-0"):
            commits.recover(output)
    assert left(tmp_path) == WHOLE | HALF
    commits.recover(output)
    assert left(tmp_path) == WHOLE


def test_rows_that_come_after_their_run_was_recovered_go_as_well(tmp_path):
    """A task of a lost scorer ends its upload when the run is over or goes on without it."""
    lay(tmp_path, *WHOLE, "frame_scores/w1_0-0.parquet", "failures/w1_0-0.parquet")
    lay(tmp_path, "failures/plan-m.parquet")
    commits.recover(Output(str(tmp_path)))
    assert left(tmp_path) == WHOLE | {"failures/plan-m.parquet"}


def test_a_commit_whose_rows_were_removed_meanwhile_is_undone(tmp_path):
    lay(tmp_path, *WHOLE, "_checkpoint/w1_0.parquet")
    commits.recover(Output(str(tmp_path)))
    assert left(tmp_path) == WHOLE


def test_a_copy_without_its_commits_is_refused_and_stays_as_it_is(tmp_path):
    rows = WHOLE - {"_checkpoint/w2_0.parquet"}
    lay(tmp_path, *rows)
    with pytest.raises(OutputError, match="copy that folder too"):
        commits.recover(Output(str(tmp_path)))
    assert left(tmp_path) == rows
