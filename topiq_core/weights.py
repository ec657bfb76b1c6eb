"""Find, fetch, verify and load weights. Nothing is ever unpickled beyond plain tensors.

torch is imported only where tensors are touched: finding and verifying a file needs none of it.
"""

import hashlib
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from topiq_core import cards
from topiq_core.cards import Card
from topiq_core.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from topiq_core.cfanet import CFANet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """A weights file on this machine. `sha256` is the whole hash, in hex."""

    card: Card
    path: Path
    sha256: str


def cache_dir() -> Path:
    """Where fetched weights are kept: $TOPIQ_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TOPIQ_CACHE") or f"{base}/topiq").expanduser()


def resolve(model: str | Path, source: str | Path | None = None, verify: bool = True) -> Weights:
    """Find the weights of a model and check that they are the right ones.

    model: a card's name, or a .safetensors file exported by training. source: a local path or
    any fsspec URL; without it, bundled weights are used, and published ones are fetched from the
    Hugging Face hub. verify: compare the file's sha256 with the card's.
    Raises CardError (unknown model) and WeightsError (absent, unreachable, or another file).
    """
    card, path = cards.find(model)
    if source is not None:
        path = _fetch(str(source))
    elif path is None:
        path = _fetch_from_hub(card)
    digest = sha256_of(path)
    if verify and not digest.startswith(card.sha256):
        if "://" in str(source):
            path.unlink(missing_ok=True)  # a damaged transfer is fetched anew the next time
        raise WeightsError(
            f"{path}: sha256 starts with {digest[:8]}, but {card.name} is {card.sha256}. The file "
            "is damaged or another model's. If it is meant (own training on this architecture), "
            "turn verification off: verify=False, or `--set verify_weights=false`."
        )
    return Weights(card, path, digest)


def load(weights: Weights) -> "CFANet":
    """Build the network of the card and fill it strictly. Returns it in eval mode, fp32, on CPU.

    Raises WeightsError when the file is not a checkpoint or its keys or shapes differ.
    """
    from topiq_core.cfanet import CFANet

    try:
        net = CFANet(weights.card.architecture)
    except (KeyError, ValueError, AssertionError) as error:
        raise WeightsError(
            f"{weights.path}: its card describes a network that this version cannot build: "
            f"{weights.card.architecture} ({error})."
        ) from error
    try:
        net.load_state_dict(_read_state(weights.path), strict=True)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise WeightsError(
            f"{weights.path}: not a checkpoint of {weights.card.name}: {' '.join(lines[1:4])[:600]}"
        ) from error
    return net.eval()


def _read_state(path: Path) -> "dict[str, Tensor]":
    """Tensors by name, as fp32, without the `params` wrapper and the `module.` prefix."""
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            raw = load_file(path)
        else:
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{path}: cannot be read as weights ({error}). A .safetensors file or a PyTorch "
            "checkpoint of plain tensors is needed; fetch the file again."
        ) from error
    state = raw.get("params", raw) if isinstance(raw, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise WeightsError(f"{path}: holds no state dict (a mapping of names to tensors).")
    return {
        key.removeprefix("module."): value.float() if value.is_floating_point() else value
        for key, value in state.items()
    }


def save(net: "CFANet", card: Card, path: Path) -> None:
    """Write a network as safetensors, in fp16, with its card inside; atomically."""
    from safetensors.torch import save_file

    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in net.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(state, partial, metadata={cards.METADATA_KEY: card.to_json()})
    partial.chmod(0o644)  # safetensors makes it private
    partial.replace(path)


def sha256_of(path: Path) -> str:
    """The hash of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fetch(source: str) -> Path:
    """A local file for `source`. A remote one is kept in the cache until the store has another."""
    if "://" not in source:
        path = Path(source).expanduser()
        if not path.is_file():
            raise WeightsError(f"{path}: no such weights file.")
        return path
    import fsspec

    name, versions = Path(source.split("?")[0]).name, cache_dir() / _short_hash(source)
    try:
        fs, path = fsspec.core.url_to_fs(source)
        folder = versions / _short_hash(str(fs.ukey(path)))
    except Exception:  # the store cannot be asked now: what was fetched before will do
        known = sorted(versions.glob("*"), key=lambda one: one.stat().st_mtime)
        folder = known[-1] if known else versions / "unknown"
    target = folder / name
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with fsspec.open(source, "rb") as remote, partial.open("wb") as local:
            shutil.copyfileobj(remote, local, 1 << 22)
        partial.replace(target)
    except Exception as error:
        raise WeightsError(f"{source}: weights cannot be fetched ({error}).") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _fetch_from_hub(card: Card) -> Path:
    how = (
        f"Download {card.filename} from https://huggingface.co/{card.hub_repo} on a machine that "
        "can, and pass it with --weights FILE (Scorer.load(..., weights=FILE))."
    )
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError as error:
        raise WeightsError(
            f"{card.name}: its weights are not bundled. To have them fetched: "
            f"pip install -e '.[hub]'. Or: {how}"
        ) from error
    repo = str(card.hub_repo)
    if not isinstance(try_to_load_from_cache(repo, card.filename), str):
        log.warning("%s: fetching weights under the licence %s", card.name, card.licence)
    try:
        return Path(hf_hub_download(repo, card.filename))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"{card.name}: the Hugging Face hub cannot be reached ({reason}). {how}"
        ) from error
