"""Whether a full-reference model puts a picture above its renditions, for every clip of a folder.

    python benchmarks/itself.py [--model CARD] [--frame N] FOLDER

Takes the Nth frame of each clip (or its last one), encodes it by x264 without loss and at three
qualities, and compares all four with the first. Pictures of one colour come back the same at every
quality, and tie.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import av
import numpy as np

from jobs.sample_media import RGB, encode
from topiq_core.scorer import Scorer

QUALITIES = ({"qp": "0"}, {"crf": "23"}, {"crf": "33"}, {"crf": "43"})


def frame(path: Path, number: int) -> RGB:
    """A frame as RGB, with even sides."""
    with av.open(str(path)) as container:
        *_, found = itertools.islice(container.decode(video=0), number)
        rgb = found.to_ndarray(format="rgb24")
    height, width = (side // 2 * 2 for side in rgb.shape[:2])
    return np.ascontiguousarray(rgb[:height, :width])


def main() -> None:
    """Encode, score, count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="cfanet_lite_fr")
    parser.add_argument("--frame", type=int, default=40)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    scorer = Scorer.load(options.model)
    on_top = total = 0
    for path in sorted(options.folder.iterdir()):
        try:
            picture = frame(path, options.frame)
        except (av.error.FFmpegError, ValueError) as error:
            print(f"left out: {path.name} ({error})")
            continue
        if min(picture.shape[:2]) < 64:
            continue
        with tempfile.TemporaryDirectory() as folder:
            ladder = [
                frame(encode(Path(folder, f"{i}.mkv"), [picture], options=quality), 1)
                for i, quality in enumerate(QUALITIES)
            ]
        scores = scorer.score_renditions(ladder, ladder[0])
        total += 1
        on_top += scores[0] > max(scores[1:])
        if scores[0] <= max(scores[1:]):
            print(path.name, scores)
    print(f"{on_top} of {total} on top")


if __name__ == "__main__":
    main()
