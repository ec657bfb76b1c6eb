"""One run at a time on an output, and no waiting for the dead."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline import lease
from pipeline.errors import OutputError, RunError
from pipeline.output import Output


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "PERIOD_S", 0.1)
    monkeypatch.setattr(lease, "_SETTLE_S", 0.05)
    return Output(str(tmp_path))


def on_disk(output):
    return json.loads(output.read_text(lease.FILE))


def foreign(output, renewals=1):
    """A lease as a run on another machine writes it."""
    fields = {"owner": "x", "run_id": "r1", "machine": "elsewhere", "pid": 1, "host": "node-7"}
    output.write_text(json.dumps(fields | {"renewals": renewals}), lease.FILE)


def test_a_lease_is_renewed_while_it_is_held_and_gone_afterwards(output):
    with lease.held(output, "run"):
        first = on_disk(output)["renewals"]
        deadline = time.monotonic() + 10
        while on_disk(output)["renewals"] < first + 2:
            assert time.monotonic() < deadline
    assert output.read_text(lease.FILE) is None


def test_an_output_in_use_on_this_machine_is_refused_by_name(output):
    with (
        lease.held(output, "the-first"),
        pytest.raises(OutputError, match="the-first"),
        lease.held(output, "the-second"),
    ):
        pass
    assert output.read_text(lease.FILE) is None


def test_a_killed_owner_on_this_machine_does_not_block(output):
    program = (
        "import sys, time\n"
        "from pipeline import lease\n"
        "from pipeline.output import Output\n"
        "with lease.held(Output(sys.argv[1]), 'killed'):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, output.path], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match="killed"), lease.held(output, "too-early"):
        pass
    owner.kill()
    owner.wait()
    with lease.held(output, "next"):
        assert on_disk(output)["run_id"] == "next"


def test_where_processes_cannot_be_looked_up_a_lease_that_nobody_renews_does_not_block(
    output, monkeypatch
):
    monkeypatch.setattr(lease, "_process_start", lambda _: None)
    with lease.held(output, "killed"):
        left = on_disk(output)
    output.write_text(json.dumps(left), lease.FILE)
    with lease.held(output, "next"):
        assert on_disk(output)["run_id"] == "next"


def test_a_lease_elsewhere_that_is_renewed_is_respected(output):
    foreign(output)
    stopped = threading.Event()

    def renew():
        renewals = 1
        while not stopped.wait(0.05):
            renewals += 1
            foreign(output, renewals)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(OutputError, match="node-7"), lease.held(output, "mine"):
            pass
    finally:
        stopped.set()
        thread.join()
    assert on_disk(output)["run_id"] == "r1"


def test_a_lease_elsewhere_that_is_no_longer_renewed_is_taken_over(output):
    foreign(output)
    with lease.held(output, "mine"):
        assert on_disk(output)["run_id"] == "mine"


@pytest.mark.parametrize("damaged", ["", "{", "[]"])
def test_a_damaged_lease_does_not_block(output, damaged):
    output.write_text(damaged, lease.FILE)
    with lease.held(output, "mine"):
        assert on_disk(output)["run_id"] == "mine"


def test_a_run_that_lost_its_lease_stops_says_so_and_leaves_the_new_owners(output):
    started = time.monotonic()
    with pytest.raises(RunError, match="took this output over"):
        work_while_another_takes_over(output)
    assert time.monotonic() - started < 30
    assert on_disk(output)["run_id"] == "r1"


def work_while_another_takes_over(output):
    with lease.held(output, "mine"):
        foreign(output)
        time.sleep(60)


def test_a_signal_that_was_not_seen_comes_again(output, monkeypatch):
    """As one is that comes while Ray waits in its own code."""
    monkeypatch.setattr(lease, "_SIGNAL_EVERY_S", 0.05)
    seen = []

    def work_on():
        with lease.held(output, "mine"):
            foreign(output)
            while len(seen) < 2:
                try:
                    time.sleep(60)
                except lease.Lost:
                    seen.append(1)

    with pytest.raises(RunError, match="took this output over"):
        work_on()
    assert len(seen) == 2


def test_somebody_elses_signal_ends_nothing_and_reaches_who_waited_for_it(output):
    caught = []
    before = signal.signal(signal.SIGUSR1, lambda *_: caught.append(1))
    try:
        with lease.held(output, "mine"):
            signal.raise_signal(signal.SIGUSR1)
            assert on_disk(output)["run_id"] == "mine"
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(caught) == 2


def test_what_a_killed_owner_was_writing_is_removed_by_the_next(output, tmp_path):
    program = (
        "import os, signal, sys\n"
        "from pipeline import lease\n"
        "from pipeline.output import Output\n"
        "output = Output(sys.argv[1])\n"
        "with lease.held(output, 'killed'), output.publish('scores', 'm.parquet') as path:\n"
        "    path.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "scores").iterdir()
    assert left.read_text() == "half"
    with lease.held(output, "next"):
        assert list((tmp_path / "scores").iterdir()) == []


def test_a_lease_outlives_a_store_that_does_not_answer_for_a_while(output, monkeypatch):
    """Object stores raise exceptions of their own, which are no OSErrors."""

    class Unreachable(Exception):
        pass

    def refuse(*_, **__):
        raise Unreachable

    with lease.held(output, "run"):
        with monkeypatch.context() as away:
            for name in ("read_text", "ls"):
                away.setattr(output.fs, name, refuse)
            time.sleep(0.5)
        before = on_disk(output)["renewals"]
        deadline = time.monotonic() + 10
        while on_disk(output)["renewals"] < before + 2:
            assert time.monotonic() < deadline
    assert output.read_text(lease.FILE) is None
