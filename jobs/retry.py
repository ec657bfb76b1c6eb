"""`topiq retry`: try again what failed."""

from typing import Annotated

import typer

from jobs import cli, options


def retry(
    output: Annotated[str, typer.Argument(help="Output folder of `topiq score`.")],
    only: Annotated[
        str, typer.Option(help="Failure codes to try again, with commas between; all without it.")
    ] = "",
    source: Annotated[
        str | None, typer.Option(help="The catalog, when the recorded one had credentials in it.")
    ] = None,
    settings: options.Settings = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per event on stdout.")
    ] = False,
) -> None:
    """Score what failed again, with the source and the options of the last run.

    --set changes an option: a timeout, or what had credentials in it and so was not recorded.

    Items that failed at planning are looked at again in any case. What is scored stays as it is.
    Exit codes as those of `topiq score`.
    """
    from jobs.console import Events
    from pipeline import run

    events = Events(as_json)
    try:
        codes = [code for code in only.split(",") if code]
        summary = run.retry(output, codes, events, source, settings)
    finally:
        events.close()
    if summary.failed:
        raise cli.SomeFailed


if __name__ == "__main__":
    cli.main("retry")
