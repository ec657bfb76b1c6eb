"""`topiq filter`: keep the items that satisfy a condition on their scores."""

from typing import Annotated

import typer

from jobs import cli


def filter(
    output: Annotated[str, typer.Argument(help="Output folder of `topiq score`.")],
    where: Annotated[
        str,
        typer.Option(help="DuckDB SQL over scores/, such as 'score_p5 >= 0.45 and height >= 720'."),
    ],
    to: Annotated[str, typer.Option(help="Manifest to write: .parquet, .csv or .jsonl.")],
    model: Annotated[
        str | None, typer.Option(help="Scores of this model; needed when there are several.")
    ] = None,
) -> None:
    """Write the rows of scores/ that satisfy WHERE, as a manifest that `topiq score` reads too."""
    from pipeline import curation
    from pipeline.output import Output

    kept, total = curation.keep(Output(output), where, to, model)
    share = f" ({kept / total:.1%})" if total else ""
    cli.say(f"kept {kept} of {total} items{share}: {to}")


if __name__ == "__main__":
    cli.main("filter")
