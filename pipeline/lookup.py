"""A mapping that many tasks look into."""

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import ray


class Lookup:
    """A mapping of strings to strings or integers, in the object store, as it may be a large one.

    As an argument a dictionary would be taken apart again by every task, and be held in each
    worker's memory. Here tasks share what is on their node, and read what they look for.
    """

    def __init__(self, values: Mapping[str, str] | Mapping[str, int]) -> None:
        keys = sorted(values)
        found = [_stored(values[key]) for key in keys]
        self._table = ray.put(pa.table({"key": keys, "value": found})) if keys else None

    def get(self, key: str, otherwise: Any) -> Any:
        """The value of a key, or else what is given."""
        if self._table is None:
            return otherwise
        table = ray.get(self._table)
        keys = table["key"]
        place = bisect_left(keys, key, key=lambda found: found.as_py())
        if place == len(keys) or keys[place].as_py() != key:
            return otherwise
        value = table["value"][place].as_py()
        return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _stored(value: str | int) -> bytes | int:
    """Texts as bytes: they may be addresses of files whose names are no UTF-8."""
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
