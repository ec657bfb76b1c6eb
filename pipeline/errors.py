"""Every reason why a media item or a run fails, each with its stable code."""

from typing import ClassVar

from topiq_core.errors import TopiqError


class ConfigError(TopiqError):
    """An option has a value that makes no sense. Nothing was started."""

    code = "bad_config"


class CatalogError(TopiqError):
    """The source names no catalog: absent, unreadable, or a manifest without a `uri` column."""

    code = "bad_catalog"


class OutputError(TopiqError):
    """The output folder cannot be used, or what is in it is not what this command expects."""

    code = "bad_output"


class RunError(TopiqError):
    """The run itself broke: too many failures, lost rows, a cluster too small."""

    code = "run_failed"


class TooManyFailures(RunError):
    """More work units failed than the options allow."""

    code = "too_many_failures"


class LostUnits(RunError):
    """Planned work units have neither scores nor a failure."""

    code = "lost_units"


class ScorersDied(RunError):
    """Scoring processes died more often than is tried again, or their node went away."""

    code = "scorers_died"


class MediaError(TopiqError):
    """One item, or one unit of it, cannot be scored. Becomes one row in `failures/`."""

    code = "media_error"
    transient: ClassVar[bool] = False
    """Whether trying again may help although the file and the options are the same."""


class NotFound(MediaError):
    """The object does not exist."""

    code = "not_found"


class AccessDenied(MediaError):
    """The object exists but may not be read."""

    code = "access_denied"


class StorageError(MediaError):
    """The store did not deliver the object: network, server or disk trouble."""

    code = "storage_error"
    transient = True


class Throttled(MediaError):
    """The store asks for fewer requests, or is too busy to answer."""

    code = "throttled"
    transient = True


class NotMedia(MediaError):
    """The content is neither an image nor a video, whatever the name says."""

    code = "not_media"


class NoVideoStream(MediaError):
    """A media file without pictures: audio, subtitles, or cover art only."""

    code = "no_video_stream"


class NoFrames(MediaError):
    """A video track is declared but holds no frames, such as an initialisation segment."""

    code = "no_frames"


class UnsupportedCodec(MediaError):
    """The pictures are in a format that the decoders at hand do not know."""

    code = "unsupported_codec"


class UnsupportedColour(MediaError):
    """HDR while `hdr` is `refuse`, or a colour matrix for which there is no conversion."""

    code = "unsupported_colour"


class Encrypted(MediaError):
    """The pictures are encrypted (DRM)."""

    code = "encrypted"


class DecodeError(MediaError):
    """The content is damaged: nothing in it could be decoded."""

    code = "decode_error"


class DecodeTimeout(MediaError):
    """Opening or decoding did not end in the time allowed; the decoder was stopped."""

    code = "decode_timeout"


class DecodeCrash(MediaError):
    """The decoder process died on this file, or was killed."""

    code = "decode_crash"


class DecodeMemory(MediaError):
    """Decoding needs more memory than is allowed."""

    code = "decode_memory"


class TooLarge(MediaError):
    """More pixels, seconds, streams or bytes than the configured limits allow."""

    code = "too_large"


class TooSmall(MediaError):
    """A picture is smaller than the network can judge."""

    code = "too_small"


class OutOfMemory(MediaError):
    """Scoring one frame needs more memory than the device has."""

    code = "out_of_memory"


class Unpaired(MediaError):
    """No reference, or no single one, belongs to the item by the rule given."""

    code = "unpaired"


class Misaligned(MediaError):
    """Where the item lies in its reference cannot be told with confidence."""

    code = "misaligned"


class InternalError(MediaError):
    """A fault of ours: please report it with the message."""

    code = "internal_error"


BY_CODE: dict[str, type[MediaError]] = {kind.code: kind for kind in MediaError.__subclasses__()}
"""The codes that may stand in `failures/`, and what each means."""
