"""Which reference belongs to which distorted item: by a column, or by a key that both names hold.

Never by position in a sorted list: one missing file would shift every pair after it. What cannot be
paired for certain stays unpaired, with the reason.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.errors import ConfigError

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


@dataclass(frozen=True)
class References:
    """Where references are, as options say it. At most one of `file` and `root`.

    file: the reference of every item. root: a folder; items pair with what has the same key in it.
    pattern: what the key is (`pattern_key`); without it, the path below the folder. Raises
    ConfigError for what does not go together.
    """

    file: str | None = None
    root: str | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.file is not None and self.root is not None:
            raise ConfigError("give --reference or --reference-root, not both.")
        if self.pattern is not None:
            if self.root is None:
                raise ConfigError("pair_pattern pairs with what lies below --reference-root.")
            pattern_key(self.pattern)

    @property
    def given(self) -> bool:
        """Whether the options say anything of references."""
        return (self.file or self.root) is not None

    def pair(self, distorted: Sequence[str], references: Sequence[str], base: str) -> list[Pairing]:
        """Pair items below the folder `base` with the files below the root.

        All are named as listings name them: s3:// also where the option says s3a://.
        """
        if self.pattern is not None:
            key = pattern_key(self.pattern)
            return pair_by_key(distorted, references, key, key)
        root = storage.unstrip(*storage.locate(storage.absolute(self.root or "")))
        return pair_by_key(distorted, references, path_key(base), path_key(root))


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
        return Pairing(
            item, None, f"no reference has its key '{key}'; with pair_pattern, choose another key."
        )
    if len(candidates) > 1:
        named = ", ".join(sorted(candidates)[:_NAMED])
        more = ", ..." if len(candidates) > _NAMED else ""
        return Pairing(
            item, None, f"{len(candidates)} references have its key '{key}': {named}{more}."
        )
    return Pairing(item, candidates[0])
