"""Every option once: its default, its unit, and why one would change it.

The command line, YAML files and docs/configuration.md all come from this model.
"""

import json
import shlex
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.errors import ConfigError
from pipeline.fidelity import MEASURES
from pipeline.media.colour import Background, Crop, Hdr, Interlaced, Policy
from pipeline.media.sample import SampleSpec
from pipeline.pairing import References
from pipeline.pooling import DEFAULT_POOLING, check_names
from pipeline.storage import redacted

Align = Literal["pts", "auto", "none"]
ScaleTo = Literal["reference", "distorted"]


class Config(BaseModel):
    """Options of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        default="cfanet_lite_nr",
        description="Card to score with, or a .safetensors file exported by `topiq train`. "
        "`cfanet_lite_nr` and `cfanet_lite_fr` are bundled; published cards are fetched on first "
        "use. Several, with commas between them, score the same frames, which are decoded once.",
    )
    weights: str | None = Field(
        default=None,
        description="Path or URL of the weights, for cards that are not bundled. On a cluster, "
        "a place that every node can read. For several models as many, in their order; nothing "
        "between two commas where a model needs none.",
    )
    verify_weights: bool = Field(
        default=True,
        description="Refuse weights whose sha256 is not that of a published card. To be turned off "
        "for weights of your own given as `weights`; a file given as `model` brings its own card.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="`auto` takes GPUs when the cluster has any; `cpu` or `cuda` insist.",
    )
    precision: Literal["fp32", "fp16", "bf16", "int8"] = Field(
        default="fp32",
        description="Arithmetic of the network. `fp16` is for GPUs, `bf16` for GPUs and for CPUs "
        "with AMX, `int8` for no-reference models on CPUs with AVX-512 VNNI. All three are refused "
        "for a model that would rank pictures otherwise than in fp32. On GPUs prefer `fp16`: it "
        "is more exact. See docs/operations.md.",
    )
    sample: str = Field(
        default="uniform:16",
        description="Moments of a video to score: `uniform:N` (N, evenly spread), `fps:R` (R a "
        "second), `every:K` (each Kth frame), `keyframes`, or `all`.",
    )
    alpha: Background = Field(
        default="black",
        description="What images and video frames are laid over, where they are transparent, "
        "before scoring.",
    )
    hdr: Hdr = Field(
        default="tonemap",
        description="What to do with HDR video (PQ, HLG): `tonemap` to standard range, marked in "
        "the `hdr` column, or `refuse`: it fails as `unsupported_colour`. See docs/colour.md.",
    )
    interlaced: Interlaced = Field(
        default="deinterlace",
        description="What to do with frames flagged as interlaced: `deinterlace` (bwdif, one "
        "picture a frame), or `keep` their two fields woven, and their combing in the score.",
    )
    crop: Crop = Field(
        default="none",
        description="`auto` looks for black bars around a video, in eight frames while planning, "
        "and scores the picture between them.",
    )
    reference: str | None = Field(
        default=None,
        description="For models that compare: the file that every item is compared with. A "
        "manifest names references itself, in its column `reference_uri`.",
    )
    reference_root: str | None = Field(
        default=None,
        description="Folder or prefix of references: an item goes with the file of the same path "
        "below it, whatever the suffix.",
    )
    pair_pattern: str | None = Field(
        default=None,
        description="Pair by a part of the names instead: a regular expression with a group "
        "`key`, such as `(?P<key>title\\d+)_`, applied to items and to what is in reference_root.",
    )
    align: Align = Field(
        default="pts",
        description="Which reference frame a frame is compared with: `pts`, the one on screen at "
        "the same time since the start; `auto`, the same after an offset that is read off the "
        "pictures, or the item fails as `misaligned`; `none`, the one of the same number.",
    )
    align_within_s: float = Field(
        default=1.0, gt=0, description="Largest offset that `align: auto` looks for, either way."
    )
    scale_to: ScaleTo = Field(
        default="reference",
        description="Where sizes differ: bring the distorted picture to the size of the "
        "`reference` (bicubic), as VMAF is used, or the other way round (`distorted`).",
    )
    measures: tuple[str, ...] = Field(
        default=(),
        description="Classic measures beside the score of models that compare: psnr, ssim, "
        "ms_ssim. Refused for other models, which have nothing to measure against. See "
        "docs/full-reference.md.",
    )
    pooling: tuple[str, ...] = Field(
        default=DEFAULT_POOLING,
        description="Columns that pool frame scores over time: mean, se, hmean, min, max, std, "
        "pN (a percentile), worst_Ns (the worst N seconds).",
    )
    max_pixels: int = Field(
        default=25_000_000,
        gt=0,
        description="Largest picture accepted, in pixels; larger ones fail as `too_large`. This "
        "bounds the memory of a scorer on a CPU (200 MB a megapixel) and its time, "
        "which grows with the square of large pictures.",
    )
    max_duration_s: float = Field(
        default=24 * 3600.0,
        gt=0,
        description="Longest video accepted, in seconds; longer ones fail as `too_large`. A header "
        "that promises years would otherwise be planned for.",
    )
    max_file_bytes: int = Field(
        default=256 << 30,
        gt=0,
        description="Largest file accepted; larger ones fail as `too_large`, unopened.",
    )
    unit_frames: int = Field(
        default=64,
        gt=0,
        description="Most frames in a work unit, the piece that is decoded, scored and committed "
        "at once. Smaller: finer commits and less memory. Larger: less decoding twice.",
    )
    unit_bytes: int = Field(
        default=256 << 20,
        gt=0,
        description="Most decoded bytes in a work unit (at least one frame is always in it). "
        "A decode worker holds about two of these, the scorer one.",
    )
    decode_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Longest that opening a file, or decoding one work unit, may take before the "
        "decoder is stopped and the unit fails as `decode_timeout`. Raise it for slow storage.",
    )
    decode_memory_bytes: int = Field(
        default=3 << 30,
        gt=0,
        description="How much a decoder process may grow before a file fails as `decode_memory`. "
        "There is one such process for each decode task.",
    )
    attempts: int = Field(
        default=4,
        gt=0,
        description="How often a unit is tried when the store is busy or connections break; waits "
        "double from half a second. Damage is not tried again.",
    )
    on_partial: Literal["score", "fail"] = Field(
        default="score",
        description="What to do with a unit of which a part is damaged or missing: `score` what "
        "there is and mark it `partial`, or `fail` it.",
    )
    units_per_commit: int = Field(
        default=64,
        gt=0,
        description="Most work units written, and lost at worst, at once. Larger: fewer, bigger "
        "Parquet files. Decoded frames of 128 MiB end a commit too, however few units they are of.",
    )
    decode_tasks: int = Field(
        default=0,
        ge=0,
        description="Units decoded at the same time; 0 means one per CPU of the cluster.",
    )
    score_actors: int = Field(
        default=0,
        ge=0,
        description="Scorers; 0 means one per GPU share, or without GPUs as many of one thread as "
        "each node's CPUs and memory allow for the largest frame of the plan, at least one per 4 "
        "CPUs.",
    )
    gpus_per_actor: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="GPU share of a scorer. Half shares let two scorers overlap copies and work.",
    )
    object_store_bytes: int = Field(
        default=0,
        ge=0,
        description="Size of Ray's object store when the run starts Ray itself; decoded frames "
        "wait there, and fill it. 0 means a fifth of the memory, at least 0.5 GiB and at most 8, "
        "or one for each CPU where that is more.",
    )
    wait_for_nodes_s: float = Field(
        default=900.0,
        ge=0,
        description="How long to wait for the nodes of an autoscaled cluster. With device `cuda` "
        "its GPUs are asked for; with `auto`, only those that are up already are used.",
    )
    no_progress_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        description="How long planning or scoring may go without anything moving on, be it one "
        "file that is given up, before the run ends with what each stage was doing. Longer than a "
        "unit may take to decode and to score, with its `attempts`.",
    )
    fail_on_error: bool = Field(
        default=False,
        description="Stop the run at the first unit that fails, with exit code 1. What failed is "
        "in failures/; the same command goes on with the rest.",
    )
    max_failures: int | None = Field(
        default=None,
        ge=0,
        description="Stop the run when more work units than this have failed, as fail_on_error.",
    )

    @field_validator("pooling", "measures", mode="before")
    @classmethod
    def _with_commas(cls, given: object) -> object:
        """A list may also be given as on the command line, with commas between its members."""
        if not isinstance(given, str):
            return given
        return [name for part in given.split(",") if (name := part.strip())]

    @field_validator("sample")
    @classmethod
    def _sample_is_known(cls, text: str) -> str:
        SampleSpec.parse(text)
        return text

    @field_validator("pooling")
    @classmethod
    def _pooling_is_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_names(names)
        return names

    @field_validator("measures")
    @classmethod
    def _measures_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in MEASURES]
        if unknown:
            raise ConfigError(f"unknown measure '{unknown[0]}': use {', '.join(MEASURES)}")
        return names

    @property
    def models(self) -> list[tuple[str, str | None]]:
        """The models and the places of their weights. Raises ConfigError where these differ."""
        names = [name.strip() for name in self.model.split(",")]
        places = [place.strip() or None for place in (self.weights or "").split(",")]
        if self.weights is None:
            places = [None] * len(names)
        if not all(names) or len(set(names)) != len(names) or len(places) != len(names):
            raise ConfigError(
                f"model '{self.model}': give different names, with commas between them, and as "
                f"many weights or none (there are {len(places)} for {len(names)})."
            )
        return list(zip(names, places, strict=True))

    @property
    def references(self) -> References:
        """Where references are. Raises ConfigError for options that do not go together."""
        return References(self.reference, self.reference_root, self.pair_pattern)

    def replay(self, uri: str, reference_uri: str | None = None) -> str:
        """The command that scores one item alone with these options."""
        dumped = self.model_dump(mode="json", exclude_defaults=True)
        fields = {k: redacted(v) if isinstance(v, str) else v for k, v in dumped.items()}
        if reference_uri is not None:
            fields |= {"reference": reference_uri}
            fields = {
                k: v for k, v in fields.items() if k not in ("reference_root", "pair_pattern")
            }
        settings = [
            f"--set={name}={json.dumps(value, ensure_ascii=False)}"
            for name, value in fields.items()
        ]
        return shlex.join(["topiq", "score", uri, "-o", "replay", *settings])

    @property
    def policy(self) -> Policy:
        """What may be done to pictures."""
        return Policy(self.hdr, self.interlaced, self.crop, self.alpha)

    @property
    def failures_allowed(self) -> int | None:
        """Failed units that the run survives; None means any number."""
        return 0 if self.fail_on_error else self.max_failures


def load(
    file: Path | None = None,
    settings: list[str] | None = None,
    flags: dict[str, Any] | None = None,
    recorded: dict[str, Any] | None = None,
) -> Config:
    """Resolve the options: defaults, then the YAML file, then `KEY=VALUE` settings, then flags.

    Flags that are None are left out. recorded: options of an earlier run, in place of defaults;
    those that an earlier version had and this one has not are left out.
    Raises ConfigError naming the option and what it allows.
    """
    values = {k: v for k, v in (recorded or {}).items() if k in Config.model_fields}
    if file is not None:
        values |= _read_yaml(file)
    values |= parsed(settings)
    values |= {k: v for k, v in (flags or {}).items() if v is not None}
    try:
        return Config(**values)
    except ValidationError as error:
        problems = "; ".join(_problem(e) for e in error.errors())
        raise ConfigError(f"configuration: {problems}") from error


def parsed(settings: list[str] | None) -> dict[str, Any]:
    """Values of `KEY=VALUE` settings by key. Raises ConfigError."""
    values = {}
    for setting in settings or []:
        key, found, text = setting.partition("=")
        if not found:
            raise ConfigError(f"--set {setting}: write KEY=VALUE.")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting}: the value is not YAML.") from error
    return values


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a mapping of options is needed, such as `sample: fps:1`.")
    return values


def _problem(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"there is no option '{name}'; docs/configuration.md lists them"
    return f"{name}: {error['msg']} (got {json.dumps(error['input'], default=str)})"


# By the first option of each, in the order of the fields.
_CHAPTERS = {
    "model": "Model",
    "sample": "Frames",
    "reference": "References",
    "pooling": "Pooling",
    "max_pixels": "Limits and sizes of work",
    "units_per_commit": "Commits and resources",
    "fail_on_error": "When to stop",
}


def reference() -> str:
    """The text of docs/configuration.md."""
    text = (
        "# Configuration\n\n"
        "Made from `pipeline/config.py` by `make docs`; do not edit.\n\n"
        "Given by `--config FILE` (YAML), `--set KEY=VALUE` (the value in YAML too), or the flag\n"
        "of the same name where there is one (that of `measures` is `--with`); the later of these\n"
        "wins. Lists are written `[a, b]` or `a,b`. A file, for example:\n\n"
        "```yaml\nmodel: cfanet_lite_nr\nsample: fps:2\npooling: [mean, p5, worst_1s]\n```\n"
    )
    for name, field in Config.model_fields.items():
        if name in _CHAPTERS:
            text += f"\n## {_CHAPTERS[name]}\n\n"
            text += "| option | values | default | what it does |\n|---|---|---|---|\n"
        values, default = _values(field.annotation), _shown(name, field.default)
        text += f"| `{name}` | {values} | {default} | {field.description} |\n"
    return text


def _values(kind: Any) -> str:
    """What an option may be, in words."""
    parts = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if get_origin(kind) is tuple:
        return "list"
    (only,) = parts or (kind,)
    words = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
    return words[only]


def _shown(name: str, default: Any) -> str:
    """A default as people read it."""
    if default is None or default == ():
        return "none"
    if isinstance(default, tuple):
        return f"`{','.join(default)}`"
    if name.endswith("_bytes") and default:
        size = f"{default >> 30} GiB" if default >= 1 << 30 else f"{default >> 20} MiB"
        return f"`{default}` ({size})"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
