"""The TOPIQ metric: on PyTorch alone.

`from topiq_core import Scorer` is the whole of it for most users.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topiq_core.scorer import Scorer

__all__ = ["Scorer"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `topiq --help` must not wait for it.
    if name == "Scorer":
        from topiq_core.scorer import Scorer

        return Scorer
    raise AttributeError(name)
