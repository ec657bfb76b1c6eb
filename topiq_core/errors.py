"""The root of every error this project raises on purpose, and those of the model side."""


class TopiqError(Exception):
    """An expected error: says what is wrong, with what, and what to do.

    `code` is stable: programs may match on it, messages may be reworded.
    """

    code = "error"


class CardError(TopiqError):
    """The model is unknown, or is asked for something it does not do."""

    code = "bad_model"


class WeightsError(TopiqError):
    """A weights file is absent, unreachable, damaged, or not the file its card names."""

    code = "bad_weights"


class FrameError(TopiqError, ValueError):
    """Frames handed to the scorer are not uint8 RGB of a size the network can take."""

    code = "bad_frame"
