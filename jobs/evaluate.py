"""`topiq evaluate`: how well the scores of a model agree with people."""

from typing import Annotated

import typer

from jobs import cli, options


def evaluate(
    ratings: Annotated[
        str,
        typer.Argument(
            help="CSV with `uri,mos` (and reference_uri, type, split, as there are), or, with "
            "--layout, the folder of a published data set."
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="Folder for the report; what is scored lies in its run/."
        ),
    ],
    layout: Annotated[
        str | None,
        typer.Option(help="Published layout, such as koniq10k; docs/accuracy.md lists them."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="COLUMN=VALUE: use these items only, such as split=test."),
    ] = None,
    model: options.Model = None,
    weights: options.WeightsFile = None,
    sample: options.Sample = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    resamples: Annotated[
        int, typer.Option(min=0, help="Bootstrap resamples of the intervals; 0 for none.")
    ] = 1000,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per event on stdout.")
    ] = False,
) -> None:
    """Score rated items: SROCC, KROCC, PLCC and RMSE with 95 % intervals, and a scatter plot.

    Writes evaluation.json, evaluation.md and scatter.png. The same command again scores only
    what is new or changed. Exit code: 0 all scored, 2 some items failed (they are listed, and in
    no number), 1 the evaluation itself failed.
    """
    resolved = options.resolve(
        config, settings, model=model, weights=weights, sample=sample, device=device
    )
    from jobs.console import Events
    from pipeline import evaluation

    events = Events(as_json)
    try:
        found = evaluation.evaluate(ratings, output, resolved, events, layout, split, resamples)
    finally:
        events.close()
    if not as_json:
        typer.echo("\n".join(evaluation.table(found)))
    if found.n_failed:
        raise cli.SomeFailed


if __name__ == "__main__":
    cli.main("evaluate")
