"""Parameters, pictures and distortions made from names and seeds: what `scores.json` was made of.

A network filled this way needs no download, and two implementations filled this way must agree.
The order of the draws is part of the definition: do not reorder them.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

# Largest difference from a golden score that fp32 on a CPU may show; the scores span several units.
TOLERANCE = 2e-5

NOISE_SIGMA = 10.0


def scores():
    """The golden cases by the name of the card."""
    return json.loads(Path(__file__).with_name("scores.json").read_text())


def fill(net):
    """Replace every entry of a network's state by the one its name stands for; in eval mode."""
    state = {name: _entry(name, tuple(t.shape)) for name, t in net.state_dict().items()}
    net.load_state_dict(state, strict=True)
    return net.eval()


def picture(seed, height, width):
    """An RGB picture uint8 [H,W,3]: twelve coloured waves, ten flat patches, and noise."""
    draw = _generator(seed)
    rows, columns = np.indices((height, width), dtype=np.float64)
    canvas = np.zeros((height, width, 3))
    for _ in range(12):
        across, down = draw.uniform(0.002, 0.25), draw.uniform(0.002, 0.25)
        wave = np.sin(across * columns + down * rows + draw.uniform(0, 6.28))
        canvas += wave[:, :, np.newaxis] * draw.uniform(-40, 40, 3)
    for _ in range(10):
        top, left = (int(draw.integers(0, side)) for side in (height, width))
        tall, wide = (int(draw.integers(8, max(9, side // 3))) for side in (height, width))
        canvas[top : top + tall, left : left + wide] += draw.uniform(-60, 60, 3)
    grain = draw.standard_normal(canvas.shape)
    return _as_pixels(127 + (canvas + grain * draw.uniform(0, 12)))


def noisy(image, seed):
    """The distorted side of a full-reference case: the picture with normal noise added."""
    return _as_pixels(image + NOISE_SIGMA * _generator(seed + 500).standard_normal(image.shape))


def _entry(name, shape):
    """Spread according to what the entry is, so that activations neither vanish nor explode."""
    draw = _generator(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if kind == "running_var":
        values = 0.5 + draw.random(shape)
    elif kind in ("h_emb", "w_emb"):
        values = 0.3 * draw.standard_normal(shape)
    elif len(shape) > 1:
        values = draw.standard_normal(shape) * np.sqrt(1.8 / np.prod(shape[1:]))
    elif kind.endswith("weight"):
        # The last norm of a residual block is kept small: the sums would grow from block to block.
        values = (0.5 + draw.random(shape)) * (0.3 if ".bn3." in name else 1.0)
    else:
        values = 0.1 * draw.standard_normal(shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _generator(seed):
    return np.random.Generator(np.random.PCG64(seed))


def _as_pixels(values):
    return np.rint(values).clip(0, 255).astype(np.uint8)
