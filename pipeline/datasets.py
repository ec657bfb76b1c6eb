"""Rated data sets in the layouts they are published in: a folder to items with opinion scores.

Readers take names and numbers from the set's own label files. They open no media, and a rated
file that is absent is not their business: scoring reports it. In `mos` higher is always better;
sets that publish differences (DMOS) are turned round.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.io import loadmat

from pipeline import storage
from pipeline.errors import CatalogError, ConfigError
from pipeline.storage import MEDIA_SUFFIXES


@dataclass(frozen=True)
class Rated:
    """One item and what people said of it. `extra`: the other columns of a plain CSV."""

    uri: str
    mos: float
    reference_uri: str | None = None
    type: str | None = None
    split: str | None = None
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RatedSet:
    """The items of a set.

    mos_range: the nominal scale of `mos`, None where the set has none. inverted: the set
    publishes how bad its items are.
    """

    items: list[Rated]
    mos_range: tuple[float, float] | None = None
    inverted: bool = False


def read(source: str, layout: str | None = None) -> RatedSet:
    """A plain CSV, or a folder in one of `LAYOUTS`.

    Raises CatalogError (something is absent or unreadable) and ConfigError (no such layout).
    """
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"--layout {layout}: there are {', '.join(LAYOUTS)}.")
    folder = Path(source).expanduser().absolute()
    if layout is not None:
        if not folder.is_dir():
            raise CatalogError(f"{source}: no such folder. --layout {layout} is of a folder.")
        found = LAYOUTS[layout](folder)
    elif "://" not in source and folder.is_dir():
        raise CatalogError(
            f"{source}: a folder. Name its layout with --layout ({', '.join(LAYOUTS)}), or give "
            "a CSV with `uri,mos`."
        )
    else:
        found = plain_csv(source)
    if not found.items:
        raise CatalogError(f"{source}: no ratings in it.")
    seen = set()
    for item in found.items:
        if not math.isfinite(item.mos):
            raise CatalogError(f"{source}: {item.uri} has the rating {item.mos}.")
        if (item.uri, item.reference_uri) in seen:
            raise CatalogError(f"{source}: {item.uri} is rated twice.")
        seen.add((item.uri, item.reference_uri))
    return found


def select(items: Sequence[Rated], condition: str) -> list[Rated]:
    """The items for which COLUMN=VALUE holds. Raises ConfigError when there are none."""
    column, equals, value = condition.partition("=")
    if not equals or not column:
        raise ConfigError(f"--split {condition}: give COLUMN=VALUE, such as split=test.")

    def of(item: Rated) -> str | None:
        return getattr(item, column) if column in ("split", "type") else item.extra.get(column)

    kept = [item for item in items if of(item) == value]
    if not kept:
        there = sorted({str(v) for item in items if (v := of(item)) is not None})
        known = f"it has {', '.join(there[:20])}" if there else "the ratings have no such column"
        raise ConfigError(f"--split {condition}: nothing is left of {len(items)} items; {known}.")
    return kept


def manifest(items: Sequence[Rated]) -> pa.Table:
    """The items as a manifest that can be scored: `uri`, the ratings, then the other columns."""
    names = ("uri", "reference_uri", "type", "split")
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(item, name) for item in items], pa.string()) for name in names
    }
    columns["mos"] = pa.array([item.mos for item in items], pa.float64())
    for name in dict.fromkeys(name for item in items for name in item.extra):
        columns[name] = pa.array([item.extra.get(name) for item in items], pa.string())
    return pa.table(columns)


def plain_csv(source: str) -> RatedSet:
    """`uri` (or `image`), `mos`, and perhaps `reference_uri`, `type`, `split` and other columns.

    A column `dmos` in the place of `mos` says how bad an item is. Paths are relative to the CSV.
    """
    address = storage.absolute(source)
    base = address.rpartition("/")[0]
    try:
        fs, path = storage.locate(address)
        text = str(fs.read_text(path, encoding="utf-8-sig"))
    except (OSError, ImportError, UnicodeDecodeError) as error:
        raise CatalogError(f"{source}: not a readable CSV of ratings ({error}).") from error
    rows = csv.DictReader(io.StringIO(text))
    names = rows.fieldnames or []
    uri_name = next((n for n in ("uri", "image") if n in names), None)
    mos_name = next((n for n in ("mos", "dmos") if n in names), None)
    if uri_name is None or mos_name is None:
        raise CatalogError(
            f"{source}: columns `uri` and `mos` (or `dmos`) are needed; it has {', '.join(names)}."
        )

    def beside(uri: str) -> str:
        return uri if "://" in uri or uri.startswith("/") else f"{base}/{uri}"

    items = []
    for row in rows:
        where = f"{source}:{rows.line_num}"
        given = {name: value for name, value in row.items() if name and value}
        uri, reference = given.pop(uri_name, ""), given.pop("reference_uri", None)
        if not uri:
            raise CatalogError(f"{where}: no uri.")
        mos = _number(given.pop(mos_name, None), where)
        items.append(
            Rated(
                beside(uri),
                -mos if mos_name == "dmos" else mos,
                beside(reference) if reference else None,
                given.pop("type", None),
                given.pop("split", None),
                given,
            )
        )
    return RatedSet(items, inverted=mos_name == "dmos")


def koniq10k(folder: Path) -> RatedSet:
    """KonIQ-10k: in-the-wild photos, with the official split when its file is there.

    `koniq10k_distributions_sets.csv` (image_name, MOS, set; from the authors' repository
    subpic/koniq) or `koniq10k_scores_and_distributions.csv` (image_name, MOS_zscore or MOS);
    photos in `1024x768/`.
    """
    labels = _one_of(
        folder,
        "koniq10k_distributions_sets.csv",
        "metadata/koniq10k_distributions_sets.csv",
        "koniq10k_scores_and_distributions.csv",
    )
    images = _one_of(folder, "1024x768", "512x384")
    items = []
    standard = True
    for row in _table(labels, ["image_name", "MOS"]):
        standard = "moszscore" not in row
        mos = _number(row["mos" if standard else "moszscore"], labels)
        items.append(Rated(str(images / _text(row["imagename"])), mos, split=row.get("set")))
    likert = standard and labels.name == "koniq10k_scores_and_distributions.csv"
    return RatedSet(items, (1, 5) if likert else (1, 100))


def spaq(folder: Path) -> RatedSet:
    """SPAQ: smartphone photos.

    `Annotations/MOS and Image attribute scores.xlsx` (Image name, MOS) or that sheet as a CSV of
    the same name; photos in `TestImage/`.
    """
    name = "MOS and Image attribute scores"
    labels = _one_of(
        folder,
        *(f"{place}{name}.{kind}" for kind in ("csv", "xlsx") for place in ("Annotations/", "")),
    )
    images = _one_of(folder, "TestImage", "img")
    rows = _table(labels, ["Image name", "MOS"])
    return RatedSet(
        [Rated(str(images / _text(r["imagename"])), _number(r["mos"], labels)) for r in rows],
        (0, 100),
    )


def flive(folder: Path) -> RatedSet:
    """FLIVE (PaQ-2-PiQ): whole pictures, not patches.

    `labels_image.csv` (name, mos) or `labels_image_3patch.csv` (name_image, mos_image), with
    is_valid or is_test where given; pictures in `database/` or `images/`. The label files have
    been published in several forms; what is read here is as in the authors' code, baidut/PaQ-2-PiQ.
    """
    labels = _one_of(folder, "labels_image.csv", "labels_image_3patch.csv")
    images = _one_of(folder, "database", "images", "")
    items = []
    for row in _table(labels, []):
        name = row.get("nameimage") or row.get("name")
        mos = row.get("mosimage") or row.get("mos")
        if name is None or mos is None:
            raise CatalogError(
                f"{labels}: columns `name` and `mos`, or `name_image` and `mos_image`, are needed; "
                f"it has {', '.join(row)}."
            )
        split = "training" if {"isvalid", "istest"} & set(row) else None
        for column, meaning in (("isvalid", "validation"), ("istest", "test")):
            if str(row.get(column)).lower() in ("true", "1", "1.0"):
                split = meaning
        items.append(Rated(str(images / _text(name)), _number(mos, labels), split=split))
    return RatedSet(items, (0, 100))


def live_challenge(folder: Path) -> RatedSet:
    """LIVE In the Wild Challenge (ChallengeDB_release): 1162 mobile photos.

    `Data/AllImages_release.mat` and `Data/AllMOS_release.mat`; photos in `Images/`. The seven
    photos that subjects were trained with (t1 to t7) come first in the lists and are left out.
    """
    names = _strings(_mat(folder / "Data/AllImages_release.mat", "AllImages_release"))
    mos = _numbers(_mat(folder / "Data/AllMOS_release.mat", "AllMOS_release"))
    pairs = _zip(folder / "Data", names, mos)
    return RatedSet(
        [Rated(str(folder / "Images" / n), m) for n, m in pairs if not re.match(r"t\d+\.", n)],
        (0, 100),
    )


def ava(folder: Path) -> RatedSet:
    """AVA: photos with votes on 1..10 for their looks; `mos` is the mean vote.

    `AVA.txt` (index, image id, ten counts, two tags, challenge); photos in `images/ID.jpg`.
    """
    labels = _one_of(folder, "AVA.txt")
    images = _one_of(folder, "images", "image")
    items = []
    for number, line in enumerate(_lines(labels), start=1):
        fields = line.split()
        if len(fields) < 12:
            raise CatalogError(f"{labels}:{number}: index, image id and ten counts are needed.")
        votes = [_number(v, f"{labels}:{number}") for v in fields[2:12]]
        if not sum(votes):
            raise CatalogError(f"{labels}:{number}: no votes.")
        mean = sum(i * v for i, v in enumerate(votes, start=1)) / sum(votes)
        items.append(Rated(str(images / f"{fields[1]}.jpg"), mean))
    return RatedSet(items, (1, 10))


_LIVE_PARTS = (("jp2k", 227), ("jpeg", 233), ("wn", 174), ("gblur", 174), ("fastfading", 174))


def live(folder: Path) -> RatedSet:
    """LIVE image quality, release 2: five kinds of distortion of 29 references.

    `dmos_realigned.mat` (dmos_new, orgs) or `dmos.mat` (dmos, orgs), and `refnames_all.mat`; the
    lists go through jp2k (227), jpeg (233), wn, gblur and fastfading (174 each), where item N of a
    kind is `KIND/imgN.bmp`. Undistorted copies (orgs) are left out. Realigned differences go a
    little beyond the nominal range.
    """
    labels = _one_of(folder, "dmos_realigned.mat", "dmos.mat")
    names = [(kind, number) for kind, count in _LIVE_PARTS for number in range(1, count + 1)]
    dmos = _numbers(_mat(labels, "dmos_new" if labels.stem == "dmos_realigned" else "dmos"))
    undistorted = _numbers(_mat(labels, "orgs"))
    references = _strings(_mat(folder / "refnames_all.mat", "refnames_all"))
    items = [
        Rated(
            str(folder / kind / f"img{number}.bmp"),
            100 - difference,
            str(folder / "refimgs" / reference),
            kind,
        )
        for (kind, number), difference, original, reference in _zip(
            labels, names, dmos, undistorted, references
        )
        if not original
    ]
    return RatedSet(items, (0, 100), inverted=True)


_CSIQ_PARTS = {
    "noise": "awgn",
    "awgn": "awgn",
    "blur": "blur",
    "contrast": "contrast",
    "fnoise": "fnoise",
    "jpeg": "jpeg",
    "jpeg2000": "jpeg2000",
}


def csiq(folder: Path) -> RatedSet:
    """CSIQ: six kinds of distortion of 30 references.

    `csiq.DMOS.xlsx`, sheet all_by_image (image, dst_type, dst_lev, dmos), or that sheet as
    `csiq.DMOS.csv`; pictures in `src_imgs/` and `dst_imgs/KIND/IMAGE.KIND.LEVEL.png`.
    """
    labels = _one_of(folder, "csiq.DMOS.csv", "csiq.DMOS.xlsx")
    there = _by_name(folder / "dst_imgs")
    items = []
    for row in _table(labels, ["image", "dst_type", "dst_lev", "dmos"], "all_by_image"):
        image, given = _text(row["image"]), _text(row["dsttype"]).lower().replace(" ", "")
        kind = _CSIQ_PARTS.get(given)
        if kind is None:
            raise CatalogError(f"{labels}: unknown dst_type {given!r}.")
        name = f"{image}.{kind}.{_text(row['dstlev'])}.png"
        items.append(
            Rated(
                there.get(name.lower(), str(folder / "dst_imgs" / kind / name)),
                1 - _number(row["dmos"], labels),
                str(folder / "src_imgs" / f"{image}.png"),
                kind,
            )
        )
    return RatedSet(items, (0, 1), inverted=True)


_TID2013_TYPES = (
    "additive Gaussian noise",
    "noise in colour components",
    "spatially correlated noise",
    "masked noise",
    "high frequency noise",
    "impulse noise",
    "quantization noise",
    "Gaussian blur",
    "denoising",
    "JPEG",
    "JPEG 2000",
    "JPEG transmission errors",
    "JPEG 2000 transmission errors",
    "non-eccentricity pattern noise",
    "local block-wise distortions",
    "mean shift",
    "contrast change",
    "change of saturation",
    "multiplicative Gaussian noise",
    "comfort noise",
    "lossy compression of noisy images",
    "colour quantization with dither",
    "chromatic aberrations",
    "sparse sampling and reconstruction",
)


def tid2013(folder: Path) -> RatedSet:
    """TID2013: 24 kinds of distortion of 25 references.

    `mos_with_names.txt` (MOS, file name); pictures in `distorted_images/iRR_TT_L.bmp` and
    `reference_images/IRR.BMP`, in whatever case.
    """
    labels = _one_of(folder, "mos_with_names.txt")
    distorted, references = (
        _by_name(folder / name) for name in ("distorted_images", "reference_images")
    )
    items = []
    for line in _lines(labels):
        mos, name = line.split()
        parts = _match(r"(i\d+)_(\d+)_\d+\.bmp", name.lower(), labels)
        reference = f"{parts[1]}.bmp"
        items.append(
            Rated(
                distorted.get(name.lower(), str(folder / "distorted_images" / name)),
                _number(mos, labels),
                references.get(reference, str(folder / "reference_images" / reference)),
                _kind(parts[2], _TID2013_TYPES),
            )
        )
    return RatedSet(items, (0, 9))


_KADID10K_TYPES = (
    "Gaussian blur",
    "lens blur",
    "motion blur",
    "colour diffusion",
    "colour shift",
    "colour quantization",
    "saturation 1",
    "saturation 2",
    "JPEG 2000",
    "JPEG",
    "white noise",
    "white noise in colour components",
    "impulse noise",
    "multiplicative noise",
    "denoise",
    "brighten",
    "darken",
    "mean shift",
    "jitter",
    "non-eccentricity patch",
    "pixelate",
    "quantization",
    "colour block",
    "high sharpen",
    "contrast change",
)


def kadid10k(folder: Path) -> RatedSet:
    """KADID-10k: 25 kinds of distortion of 81 references.

    `dmos.csv` (dist_img, ref_img, dmos); pictures in `images/`. Its `dmos` is, in spite of its
    name, better when higher: 1 is very annoying, 5 imperceptible.
    """
    labels = _one_of(folder, "dmos.csv")
    items = []
    for row in _table(labels, ["dist_img", "ref_img", "dmos"]):
        name = _text(row["distimg"])
        parts = _match(r"I\d+_(\d+)_\d+\.png", name, labels)
        items.append(
            Rated(
                str(folder / "images" / name),
                _number(row["dmos"], labels),
                str(folder / "images" / _text(row["refimg"])),
                _kind(parts[1], _KADID10K_TYPES),
            )
        )
    return RatedSet(items, (1, 5))


def pieapp(folder: Path) -> RatedSet:
    """PieAPP, its test set: the part with a rating for each picture, and not only for pairs.

    `labels/test/ref_N_per_image_score.csv` (reference, distorted, how unlike they are);
    pictures in `distorted_images/test/ref_N/` and `reference_images/test/`. As documented in the
    authors' dataset_README; that the two image folders have a level `test` is the likely reading
    of it, and pictures are looked for without it too.
    """
    labels = folder / "labels/test"
    files = sorted(labels.glob("ref_*_per_image_score.csv"))
    if not files:
        raise CatalogError(f"{labels}: no ref_N_per_image_score.csv in it.")
    distorted = _by_name(_one_of(folder, "distorted_images/test", "distorted_images"))
    references = _by_name(_one_of(folder, "reference_images/test", "reference_images"))
    items = []
    for file in files:
        for line in list(csv.reader(_lines(file)))[1:]:
            reference, name, unlike = (cell.strip() for cell in line[:3])
            if name == reference:
                continue
            kind = re.match(r"distort_\d+_(.+)_(?:inter|intra)", name)
            items.append(
                Rated(
                    distorted.get(name.lower(), str(folder / "distorted_images/test" / name)),
                    -_number(unlike, file),
                    references.get(
                        reference.lower(), str(folder / "reference_images/test" / reference)
                    ),
                    kind[1] if kind else None,
                    "test",
                )
            )
    return RatedSet(items, inverted=True)


def pipal(folder: Path) -> RatedSet:
    """PIPAL, as released for NTIRE 2021: results of restoration algorithms, with Elo ratings.

    `Train_Label/REF.txt` (file name, rating), and `Val_Label/`, `Test_Label/` where public;
    pictures in `Train_Dist/` (or folders below it) and `Train_Ref/`. `type` is the first number
    of the file name.
    """
    parts = {"Train": "training", "Val": "validation", "Test": "test"}
    items = []
    for part, split in parts.items():
        files = sorted((folder / f"{part}_Label").glob("*.txt"))
        distorted = _by_name(folder / f"{part}_Dist") if files else {}
        for file in files:
            for line in _lines(file):
                name, _, rating = line.partition(",")
                found = _match(r"(\w+?)_(\d+)_\d+\.bmp", name.strip(), file)
                items.append(
                    Rated(
                        distorted.get(found[0].lower(), str(folder / f"{part}_Dist" / found[0])),
                        _number(rating, file),
                        str(folder / f"{part}_Ref" / f"{found[1]}.bmp"),
                        found[2],
                        split,
                    )
                )
    if not items:
        raise CatalogError(f"{folder}: no Train_Label/REF.txt in it.")
    return RatedSet(items)


def konvid1k(folder: Path) -> RatedSet:
    """KoNViD-1k: 1200 clips of public videos.

    `KoNViD_1k_attributes.csv` or `KoNViD_1k_mos.csv` (flickr_id, mos; in older releases
    file_name, MOS), here or in `KoNViD_1k_metadata/`; clips in `KoNViD_1k_videos/`, as ID.mp4 or,
    in older releases, ID_....mp4.
    """
    places = ("", "KoNViD_1k_metadata/")
    names = ("KoNViD_1k_attributes.csv", "KoNViD_1k_mos.csv")
    labels = _one_of(folder, *(place + name for name in names for place in places))
    clips = _one_of(folder, "KoNViD_1k_videos", "")
    there = _by_stem(clips)
    items = []
    for row in _table(labels, ["mos"]):
        name = row.get("flickrid") or row.get("filename")
        if name is None:
            raise CatalogError(f"{labels}: a column `flickr_id` or `file_name` is needed.")
        stem = Path(_text(name)).stem
        items.append(
            Rated(_with_stem(there, stem, clips / f"{stem}.mp4"), _number(row["mos"], labels))
        )
    return RatedSet(items, (1, 5))


def live_vqc(folder: Path) -> RatedSet:
    """LIVE-VQC: 585 mobile videos. `data.mat` (video_list, mos); videos in `Video/`."""
    names = _strings(_mat(folder / "data.mat", "video_list"))
    mos = _numbers(_mat(folder / "data.mat", "mos"))
    pairs = _zip(folder / "data.mat", names, mos)
    return RatedSet([Rated(str(folder / "Video" / n), m) for n, m in pairs], (0, 100))


def youtube_ugc(folder: Path) -> RatedSet:
    """YouTube-UGC: 20-second clips of uploads; `type` is the category that begins a clip's name.

    `MOS_for_YouTube_UGC_dataset.xlsx` (sheet MOS; vid, MOS full), under that name or with
    `original_videos_` before it, or that sheet as a CSV of the same name; clips anywhere below the
    folder, named by their vid, perhaps with more after it. Rows without a rating are left out.
    """
    stems = ("MOS_for_YouTube_UGC_dataset", "original_videos_MOS_for_YouTube_UGC_dataset")
    places = ("", "original_videos/")
    labels = _one_of(
        folder, *(f"{p}{s}.{kind}" for kind in ("csv", "xlsx") for s in stems for p in places)
    )
    there = _by_stem(folder)
    items = []
    for row in _table(labels, ["vid", "MOS full"], "MOS"):
        if row["mosfull"] in (None, ""):
            continue
        vid = _text(row["vid"])
        items.append(
            Rated(
                _with_stem(there, vid, folder / f"{vid}.mp4"),
                _number(row["mosfull"], labels),
                type=vid.partition("_")[0],
            )
        )
    return RatedSet(items, (1, 5))


LAYOUTS: dict[str, Callable[[Path], RatedSet]] = {
    "koniq10k": koniq10k,
    "spaq": spaq,
    "flive": flive,
    "live_challenge": live_challenge,
    "ava": ava,
    "live": live,
    "csiq": csiq,
    "tid2013": tid2013,
    "kadid10k": kadid10k,
    "pieapp": pieapp,
    "pipal": pipal,
    "konvid1k": konvid1k,
    "live_vqc": live_vqc,
    "youtube_ugc": youtube_ugc,
}
"""By name, what reads a published folder. Docstrings say which files are expected in it."""


def _one_of(folder: Path, *names: str) -> Path:
    """The first of these that is in the folder. Raises CatalogError, which names them all."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    wanted = " or ".join(name for name in names if name)
    raise CatalogError(f"{folder}: {wanted} is not in it. Is it the right folder and layout?")


def _by_name(folder: Path) -> dict[str, str]:
    """Files below a folder by their names in lower case."""
    return {path.name.lower(): str(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _by_stem(folder: Path) -> dict[str, str]:
    """Media files below a folder by their names without suffix."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in MEDIA_SUFFIXES)
    return {path.stem: str(path) for path in found}


def _with_stem(there: dict[str, str], stem: str, otherwise: Path) -> str:
    """The file of that name, else the only one whose name goes on after it with an underscore."""
    if stem in there:
        return there[stem]
    longer = [path for name, path in there.items() if name.startswith(f"{stem}_")]
    return longer[0] if len(longer) == 1 else str(otherwise)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path}: cannot be read ({error}).") from error
    return [line for line in text.splitlines() if line.strip()]


def _table(path: Path, needed: list[str], sheet: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a CSV or XLSX, by column names in lower case without anything but letters.

    They begin below the first row that has all the needed names.
    """
    rows: list[Sequence[Any]] = (
        _spreadsheet(path, sheet) if path.suffix == ".xlsx" else list(csv.reader(_lines(path)))
    )
    wanted = {_plain(name) for name in needed}
    for index, row in enumerate(rows):
        header = [_plain(cell) for cell in row]
        if wanted <= set(header):
            for values in rows[index + 1 :]:
                cells = {name: v for name, v in zip(header, values, strict=False) if name}
                if any(v not in (None, "") for v in cells.values()):
                    yield cells
            return
    raise CatalogError(f"{path}: no row with the column names {', '.join(needed)}.")


def _spreadsheet(path: Path, sheet: str | None) -> list[Sequence[Any]]:
    try:
        import openpyxl
    except ImportError as error:
        raise CatalogError(
            f"{path}: reading it needs openpyxl: pip install -e '.[evaluate]'. Or save its sheet "
            f"{sheet or ''} as {path.with_suffix('.csv').name} beside it."
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CatalogError(f"{path}: not a readable spreadsheet ({error}).") from error
    chosen = book[sheet] if sheet in book.sheetnames else book.worksheets[0]
    return list(chosen.iter_rows(values_only=True))


def _plain(name: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower()) if name is not None else ""


def _text(cell: Any) -> str:
    """A cell as text; spreadsheets keep names that are numbers as numbers."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell).strip()


def _number(cell: Any, where: Path | str) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError) as error:
        raise CatalogError(f"{where}: {cell!r} is no rating.") from error


def _match(pattern: str, name: str, where: Path) -> re.Match[str]:
    found = re.fullmatch(pattern, name)
    if found is None:
        raise CatalogError(f"{where}: {name!r} is not a file name of this layout.")
    return found


def _kind(number: str, names: Sequence[str]) -> str:
    """Such as `08 Gaussian blur`: sorts by number."""
    index = int(number)
    return f"{index:02d} {names[index - 1]}" if 1 <= index <= len(names) else f"{index:02d}"


def _mat(path: Path, name: str) -> Any:
    """A variable of a MATLAB file."""
    try:
        found = loadmat(path)
    except NotImplementedError as error:
        raise CatalogError(
            f"{path}: saved as MATLAB 7.3, which is not read here. Save it as version 7."
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise CatalogError(f"{path}: not a readable MATLAB file ({error}).") from error
    if name not in found:
        there = ", ".join(sorted(n for n in found if not n.startswith("__")))
        raise CatalogError(f"{path}: no variable {name}; it has {there}.")
    return found[name]


def _strings(cells: Any) -> list[str]:
    """A cell array of strings."""
    return [str(np.ravel(cell)[0]) for cell in np.ravel(cells)]


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in np.ravel(values)]


def _zip(where: Path, *lists: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Lists of one length, side by side. Raises CatalogError."""
    lengths = {len(values) for values in lists}
    if len(lengths) > 1:
        raise CatalogError(f"{where}: lists of different lengths {sorted(lengths)}.")
    return list(zip(*lists, strict=True))
