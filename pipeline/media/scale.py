"""Pictures brought to another size, where a rendition is smaller or larger than its reference."""

import numpy as np
from PIL import Image

from pipeline.media.colour import RGB


def scaled(rgb: RGB, width: int, height: int) -> RGB:
    """uint8 RGB [H, W, 3] at another size, by Pillow's bicubic filter (a = -0.5).

    Where it gets smaller the filter is widened, so that nothing aliases. The picture itself is
    returned when it has that size.
    """
    if rgb.shape[:2] == (height, width):
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))
