"""The command line: one typer application, one module per verb.

`topiq VERB ...`, `python -m jobs.VERB ...` and `ray job submit -- python -m jobs.VERB ...` run
the same function. Verbs import what they need when they run: `topiq --help` is quick.
"""

import importlib
import importlib.metadata
import logging
import sys
from typing import Annotated

import typer

from topiq_core.errors import TopiqError

VERBS = (
    "score", "retry", "plan", "aggregate", "filter", "ladder", "evaluate", "distort", "train",
)  # fmt: skip

EXIT_RUN_ERROR, EXIT_SOME_FAILED, EXIT_INTERRUPTED = 1, 2, 130


class SomeFailed(Exception):
    """A job did what it was asked to, but some items failed."""


def application() -> typer.Typer:
    """The application with every verb: the function of that name in the module of that name."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")
        ] = False,
    ) -> None:
        """Score the quality of images and video, catalog by catalog."""

    for verb in VERBS:
        app.command(verb)(getattr(importlib.import_module(f"jobs.{verb}"), verb))
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"topiq {importlib.metadata.version('topiq')}")
        raise typer.Exit


def main(verb: str | None = None) -> None:
    """Run `topiq`, or one verb of it. Expected errors end it with one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    try:
        application()([verb, *sys.argv[1:]] if verb else sys.argv[1:])
    except SomeFailed:
        sys.exit(EXIT_SOME_FAILED)
    except TopiqError as error:
        from pipeline.storage import redacted

        say(f"topiq: {redacted(str(error))}")
        sys.exit(EXIT_RUN_ERROR)
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:
            say("topiq: what is committed is kept; the same command goes on from there.")
        # A wrong command line ends with 2 in most programs; here 2 says that some items failed.
        sys.exit(EXIT_RUN_ERROR if end.code == EXIT_SOME_FAILED else end.code)


def say(text: str) -> None:
    """A line for the person at the terminal; stdout is for results."""
    typer.echo(text, err=True)
