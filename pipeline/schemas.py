"""The tables of an output folder, as Arrow schemas. docs/schema.md is the contract in words."""

import re

import pyarrow as pa

from pipeline import pooling

SCHEMA_VERSION = "1"

_ITEM = [
    pa.field("item_id", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("kind", pa.string()),
    pa.field("model", pa.string(), nullable=False),
]

_FACTS = [
    pa.field("container", pa.string()),
    pa.field("codec", pa.string()),
    pa.field("profile", pa.string()),
    pa.field("coded_width", pa.int32()),
    pa.field("coded_height", pa.int32()),
    pa.field("fps", pa.float64()),
    pa.field("duration_s", pa.float64()),
    pa.field("bit_rate", pa.int64()),
    pa.field("pix_fmt", pa.string()),
    pa.field("sample_aspect_ratio", pa.string()),
    pa.field("crop", pa.string()),
    pa.field("n_video_streams", pa.int32()),
    pa.field("field_order", pa.string()),
    pa.field("size_bytes", pa.int64()),
    pa.field("mtime", pa.float64()),
    pa.field("etag", pa.string()),
]

FACT_NAMES = [f.name for f in _FACTS]
STATS = ("size_bytes", "mtime", "etag")

_PAIR = [
    pa.field("reference_uri", pa.string()),
    pa.field("offset_s", pa.float64()),
    pa.field("similarity", pa.float64()),
    pa.field("confidence", pa.float64()),
    pa.field("n_matched", pa.int32()),
    pa.field("n_unmatched", pa.int32()),
]

MEASURES = ("psnr_y", "psnr_weighted", "ssim", "ms_ssim")

FRAME_FORM = pa.struct(
    [
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("pix_fmt", pa.string()),
        pa.field("matrix", pa.string()),
        pa.field("matrix_tagged", pa.bool_()),
        pa.field("full_range", pa.bool_()),
        pa.field("primaries", pa.int32()),
        pa.field("transfer", pa.int32()),
        pa.field("hdr", pa.string()),
        pa.field("interlaced", pa.bool_()),
        pa.field("rotation", pa.int32()),
        pa.field("mirrored", pa.bool_()),
        pa.field("codec_padding", pa.string()),
        pa.field("peak_nits", pa.float64()),
        pa.field("gamut_mapped", pa.bool_()),
        pa.field("deinterlaced", pa.bool_()),
        pa.field("scaled_from", pa.string()),
    ]
)


def _versioned(fields: list[pa.Field]) -> pa.Schema:
    return pa.schema(fields, metadata={"topiq_schema_version": SCHEMA_VERSION})


PLAN = _versioned(
    [
        pa.field("unit_id", pa.string(), nullable=False),
        *_ITEM,
        pa.field("unit_index", pa.int32(), nullable=False),
        pa.field("n_units", pa.int32(), nullable=False),
        pa.field("scored_pixels", pa.int64()),
        pa.field("times_s", pa.list_(pa.float64())),
        pa.field("weights_s", pa.list_(pa.float64())),
        *_FACTS,
        pa.field("code", pa.string()),
        pa.field("message", pa.string()),
        *_PAIR,
        pa.field("ladder_id", pa.string()),
        pa.field("reference_times_s", pa.list_(pa.float64())),
        pa.field("reference_crop", pa.string()),
        pa.field("reference_size_bytes", pa.int64()),
        pa.field("reference_mtime", pa.float64()),
        pa.field("reference_etag", pa.string()),
    ]
)
"""plan/: one row per work unit. Columns of the manifest follow, if there was one."""

OUTCOME = _versioned(
    [
        pa.field("unit_id", pa.string(), nullable=False),
        *_ITEM,
        pa.field("unit_index", pa.int32(), nullable=False),
        pa.field("stage", pa.string()),
        pa.field("code", pa.string()),
        pa.field("message", pa.string()),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("replay", pa.string()),
        pa.field("pts_s", pa.list_(pa.float64())),
        pa.field("score", pa.list_(pa.float32())),
        pa.field("weight_s", pa.list_(pa.float64())),
        pa.field("partial", pa.bool_(), nullable=False),
        pa.field("n_missing", pa.int32(), nullable=False),
        pa.field("frame", FRAME_FORM),
        pa.field("decode_s", pa.float64()),
        pa.field("wait_s", pa.float64()),
        pa.field("score_s", pa.float64()),
        pa.field("host", pa.string()),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("started_at", pa.timestamp("us", tz="UTC")),
        pa.field("finished_at", pa.timestamp("us", tz="UTC")),
        pa.field("reference_uri", pa.string()),
        pa.field("reference_pts_s", pa.list_(pa.float64())),
        *(pa.field(name, pa.list_(pa.float64())) for name in MEASURES),
    ]
)
"""frame_scores/ and failures/: what became of each work unit. One schema, two folders."""

NULL_WHEN_FAILED = ("weight_s", "wait_s", "reference_pts_s", *MEASURES)
"""What a unit has from decoding, and loses when it cannot be scored."""

DECODED = pa.schema(
    [f for f in OUTCOME if f.name not in ("score", "score_s")]
    + [
        pa.field("frames", pa.list_(pa.large_binary())),
        pa.field("widths", pa.list_(pa.int32())),
        pa.field("heights", pa.list_(pa.int32())),
    ]
)
"""Between the decode and the score stage, in memory only: frames are uint8 RGB, row by row."""

LADDER = pa.schema(
    [
        pa.field("outcomes", pa.list_(pa.struct([f for f in OUTCOME if f.name != "score_s"]))),
        pa.field("first", pa.list_(pa.int32())),
        pa.field("against", pa.list_(pa.list_(pa.int32()))),
        *(f for f in DECODED if f.name in ("frames", "widths", "heights")),
    ]
)
"""The same for units that share a reference, one row for all: `first` is where in `frames` each
unit's begin, `against` says for each of them which frame is its reference's."""


def scores(names: tuple[str, ...], extras: list[pa.Field]) -> pa.Schema:
    """scores/: one row per item, with its poolings and the columns of the manifest."""
    kinds = {"float": pa.float64(), "int": pa.int32()}
    return _versioned(
        [
            *_ITEM,
            *(pa.field(n, kinds[kind]) for n, kind in pooling.columns(names).items()),
            pa.field("score_model_se", pa.float64()),
            pa.field("n_frames", pa.int32(), nullable=False),
            pa.field("n_units", pa.int32(), nullable=False),
            pa.field("n_units_failed", pa.int32(), nullable=False),
            pa.field("n_missing", pa.int32(), nullable=False),
            pa.field("partial", pa.bool_(), nullable=False),
            pa.field("message", pa.string()),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            *(f for f in _FACTS if f.name not in ("coded_width", "coded_height")),
            *(f for f in FRAME_FORM if f.name not in ("width", "height", "pix_fmt")),
            pa.field("run_id", pa.string()),
            *_PAIR,
            *(pa.field(name, pa.float64()) for name in MEASURES),
            *extras,
        ]
    )


_RESERVED = frozenset(PLAN.names) | frozenset(OUTCOME.names) | frozenset(FRAME_FORM.names)
_OURS = re.compile(r"score(_.*)?|worst_.*|n_.*|pts_s|frame_score|form")


def is_reserved(name: str) -> bool:
    """Whether a manifest's own column of this name must give way to one of ours.

    It then comes out as `manifest_NAME`. Case does not count.
    """
    return name.lower() in _RESERVED or _OURS.fullmatch(name.lower()) is not None
