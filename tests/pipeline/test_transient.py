"""What may pass is tried again; what is wrong is not."""

import pytest

from pipeline import transient
from pipeline.errors import BY_CODE, AccessDenied, DecodeError, StorageError, Throttled


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(transient, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(transient, "_LONGEST_WAIT_S", 0.01)


def failing(errors):
    """Raises each error in turn, then gives an answer; counts its calls."""
    calls = []

    def work():
        calls.append(1)
        if errors:
            raise errors.pop(0)
        return "answer"

    return work, calls


def test_a_busy_store_is_asked_again():
    work, calls = failing([Throttled("busy"), StorageError("reset")])
    assert transient.persistently(work, 4) == "answer"
    assert len(calls) == 3


@pytest.mark.parametrize("error", [DecodeError("damaged"), AccessDenied("no"), ValueError("?")])
def test_what_will_not_change_is_not_tried_again(error):
    work, calls = failing([error])
    with pytest.raises(type(error)):
        transient.persistently(work, 4)
    assert len(calls) == 1


def test_the_last_error_is_raised_when_attempts_run_out():
    work, calls = failing([Throttled(str(n)) for n in range(9)])
    with pytest.raises(Throttled, match="2"):
        transient.persistently(work, 3)
    assert len(calls) == 3


def test_only_trouble_of_the_store_may_pass():
    assert {code for code, kind in BY_CODE.items() if kind.transient} == {
        "storage_error", "throttled",
    }  # fmt: skip
