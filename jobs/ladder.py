"""`topiq ladder`: renditions by bit rate, their convex hull, and BD-rates between codecs."""

from pathlib import Path
from typing import Annotated

import typer

from jobs import cli


def ladder(
    output: Annotated[str, typer.Argument(help="Output folder of `topiq score`.")],
    model: Annotated[
        str | None, typer.Option(help="Scores of this model; needed when there are several.")
    ] = None,
    anchor: Annotated[
        str | None, typer.Option(help="Codec that BD-rates compare with; the first by default.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for a plot of each ladder, as PNG.")
    ] = None,
) -> None:
    """Print the ladder of every reference, and write them all to ladders/ in OUTPUT."""
    from pipeline import ladder as ladders
    from pipeline.output import Output

    ladders.require_extra()
    out = Output(output)
    name, found = ladders.read(out, model)
    ladders.require_codec(anchor, found)
    ladders.write(out, name, found)
    for number, one in enumerate(found):
        typer.echo("\n".join(ladders.lines(one, anchor)) + "\n")
        if plots is not None:
            ladders.plot(one, plots / f"{number:04d}-{Path(one.reference_uri).stem}.png")


if __name__ == "__main__":
    cli.main("ladder")
