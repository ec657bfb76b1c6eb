"""Which reference belongs to which distorted item: by a column, or by a key that both names hold.

Never by position in a sorted list: one missing file would shift every pair after it. What cannot be
paired for certain stays unpaired, with the reason.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.errors import ConfigError, Unpaired

Key = Callable[[str], str | None]
"""From a URI to the key that it is paired by; None when it has none."""

# So many candidates are named in a message.
_NAMED = 3


@dataclass(frozen=True)
class Pairing:
    """A distorted item with its reference, or with the reason why it has none. One of the two."""

    distorted: str
    reference: str | None
    problem: str | None = None

    def required(self) -> str:
        """The reference. Raises Unpaired, with the reason, when there is none."""
        if self.reference is None:
            raise Unpaired(f"{self.distorted}: {self.problem}")
        return self.reference


@dataclass(frozen=True)
class Ladder:
    """A reference and all its renditions: what is best scored together, to decode it once."""

    reference: str
    renditions: tuple[str, ...]


def path_key(root: str) -> Key:
    """Key: the path below `root`, without its suffix. None for what does not lie below it."""
    base = root.rstrip("/") + "/"

    def key(uri: str) -> str | None:
        path = PurePosixPath(uri.removeprefix(base))
        return str(path.with_suffix("")) if uri.startswith(base) and path.name else None

    return key


def pattern_key(pattern: str) -> Key:
    """Key: what the group `key` of a regular expression matches, anywhere in the URI.

    None where it matches nothing. Raises ConfigError for a pattern that is none, or has no such
    group.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"pattern '{pattern}': no regular expression ({error}).") from error
    if "key" not in compiled.groupindex:
        raise ConfigError(f"pattern '{pattern}': name the part that pairs, as in (?P<key>[^/]+)_")

    def key(uri: str) -> str | None:
        found = compiled.search(uri)
        return found["key"] or None if found else None

    return key


def pair_by_key(
    distorted: Sequence[str], references: Sequence[str], distorted_key: Key, reference_key: Key
) -> list[Pairing]:
    """Pair items that have the same key; one Pairing per distorted item, in their order.

    Several items may share a reference (a ladder). Two references with one key are ambiguous, and
    their items stay unpaired. References without a key, or that nothing asks for, are left out.
    """
    by_key: dict[str, list[str]] = defaultdict(list)
    for reference in dict.fromkeys(references):
        key = reference_key(reference)
        if key is not None:
            by_key[key].append(reference)
    return [_paired(item, distorted_key(item), by_key) for item in distorted]


def _paired(item: str, key: str | None, by_key: dict[str, list[str]]) -> Pairing:
    if key is None:
        return Pairing(item, None, "the rule finds no key in its name. Check the pattern or root.")
    candidates = by_key.get(key, [])
    if not candidates:
        return Pairing(item, None, f"no reference has its key '{key}'.")
    if len(candidates) > 1:
        named = ", ".join(sorted(candidates)[:_NAMED])
        more = ", ..." if len(candidates) > _NAMED else ""
        return Pairing(
            item, None, f"{len(candidates)} references have its key '{key}': {named}{more}."
        )
    return Pairing(item, candidates[0])


def pair_by_column(distorted: Sequence[str], reference_uris: Sequence[str | None]) -> list[Pairing]:
    """Pair each item with what its manifest row says; an empty cell leaves it unpaired."""
    return [
        Pairing(item, given)
        if given
        else Pairing(item, None, "its manifest row has no reference_uri.")
        for item, given in zip(distorted, reference_uris, strict=True)
    ]


def ladders(pairings: Sequence[Pairing]) -> list[Ladder]:
    """Paired items by reference, both in order of first appearance."""
    renditions: dict[str, list[str]] = defaultdict(list)
    for pairing in pairings:
        if pairing.reference is not None:
            renditions[pairing.reference].append(pairing.distorted)
    return [Ladder(reference, tuple(items)) for reference, items in renditions.items()]
