"""Try again what may go better the next time: a busy store, a connection that was reset."""

from collections.abc import Callable
from typing import TypeVar

import tenacity

from pipeline.errors import MediaError

Result = TypeVar("Result")

# Seconds before the second attempt; they double each time, with as much chance added.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0


def persistently(work: Callable[[], Result], attempts: int) -> Result:
    """Do `work`, again while it raises a MediaError that is transient, at most `attempts` times."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_exponential_jitter(_FIRST_WAIT_S, _LONGEST_WAIT_S, jitter=_FIRST_WAIT_S),
        reraise=True,
    )
    return retrying(work)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, MediaError) and error.transient
