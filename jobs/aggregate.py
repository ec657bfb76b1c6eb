"""`topiq aggregate`: rebuild scores/ from the durable tables."""

from typing import Annotated

import typer

from jobs import cli, options


def aggregate(
    output: Annotated[str, typer.Argument(help="Output folder of `topiq score`.")],
    model: Annotated[
        str | None, typer.Option(help="Only this model; without it, every model planned there.")
    ] = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
) -> None:
    """Pool frame scores anew, with other poolings for example (--set pooling=[mean,p25])."""
    resolved = options.resolve(config, settings)
    from pipeline import aggregate as step
    from pipeline.output import Output

    out = Output(output)
    for name in [model] if model else step.planned_models(out):
        counts = step.run(out, name, resolved.pooling)
        cli.say(f"{name}: {counts.scored} scored, {counts.failed} failed, {counts.frames} frames")


if __name__ == "__main__":
    cli.main("aggregate")
