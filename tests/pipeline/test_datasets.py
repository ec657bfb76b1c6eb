"""Readers of published data sets, each on a folder laid out as the set is; ratings are invented."""

import csv
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.io import savemat

from pipeline import datasets
from pipeline.catalog import read as read_catalog
from pipeline.datasets import Rated
from pipeline.errors import CatalogError, ConfigError


def write_csv(path, header, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_mat(path, **variables):
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables)


def write_xlsx(path, sheet, *rows):
    openpyxl = pytest.importorskip("openpyxl")
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    filled = book.active
    if sheet is not None:
        filled.append(["This sheet is not the one."])
        filled = book.create_sheet(sheet)
    for row in rows:
        filled.append(row)
    book.save(path)


def cells(*texts):
    """A cell array of strings, as MATLAB saves it."""
    array = np.empty((len(texts), 1), dtype=object)
    array[:, 0] = texts
    return array


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def koniq10k_official(root):
    touch(root, "1024x768/1.jpg")
    header = ["image_name", "c1", "c2", "c3", "c4", "c5", "c_total", "MOS", "SD", "set"]
    write_csv(
        root / "koniq10k_distributions_sets.csv",
        header,
        ["1.jpg", 0, 0, 1, 2, 3, 6, 71.5, 9.0, "training"],
        ["2.jpg", 5, 1, 0, 0, 0, 6, 12.25, 9.0, "test"],
    )
    return [
        Rated(f"{root}/1024x768/1.jpg", 71.5, split="training"),
        Rated(f"{root}/1024x768/2.jpg", 12.25, split="test"),
    ]


def koniq10k_first_release(root):
    touch(root, "1024x768/1.jpg")
    write_csv(
        root / "koniq10k_scores_and_distributions.csv",
        ["image_name", "c1", "c_total", "MOS", "SD", "MOS_zscore"],
        ["1.jpg", 3, 6, 3.5, 0.5, 66.0],
    )
    return [Rated(f"{root}/1024x768/1.jpg", 66.0)]


def spaq_as_published(root):
    touch(root, "TestImage/00001.jpg")
    write_xlsx(
        root / "Annotations/MOS and Image attribute scores.xlsx",
        None,
        ["Image name", "MOS", "Brightness", "Colorfulness"],
        ["00001.jpg", 44.5, 1.0, 2.0],
    )
    return [Rated(f"{root}/TestImage/00001.jpg", 44.5)]


def spaq_as_csv(root):
    touch(root, "TestImage/00001.jpg")
    write_csv(
        root / "Annotations/MOS and Image attribute scores.csv",
        ["Image name", "MOS", "Brightness"],
        ["00001.jpg", 44.5, 1.0],
    )
    return [Rated(f"{root}/TestImage/00001.jpg", 44.5)]


def flive_images(root):
    touch(root, "database/voc/1.jpg")
    write_csv(
        root / "labels_image.csv",
        ["name", "mos", "is_valid"],
        ["voc/1.jpg", 70.5, "False"],
        ["ava/2.jpg", 55, "True"],
    )
    return [
        Rated(f"{root}/database/voc/1.jpg", 70.5, split="training"),
        Rated(f"{root}/database/ava/2.jpg", 55.0, split="validation"),
    ]


def flive_with_patches(root):
    touch(root, "images/1.jpg")
    write_csv(
        root / "labels_image_3patch.csv",
        ["name_image", "mos_image", "mos_patch_1", "width_image"],
        ["1.jpg", 70.5, 1.0, 640],
    )
    return [Rated(f"{root}/images/1.jpg", 70.5)]


def live_challenge(root):
    names = cells("t1.bmp", "t2.bmp", "3.bmp", "4.JPG")
    write_mat(root / "Data/AllImages_release.mat", AllImages_release=names)
    write_mat(root / "Data/AllMOS_release.mat", AllMOS_release=[[1.0, 2.0, 33.5, 44.5]])
    return [Rated(f"{root}/Images/3.bmp", 33.5), Rated(f"{root}/Images/4.JPG", 44.5)]


def ava(root):
    touch(root, "images/953619.jpg")
    write_text(
        root / "AVA.txt",
        "1 953619 0 0 0 0 2 2 0 0 0 0 1 22 1396",
        "2 953620 1 0 0 0 0 0 0 0 0 1 1 22 1396",
    )
    return [
        Rated(f"{root}/images/953619.jpg", 5.5),
        Rated(f"{root}/images/953620.jpg", 5.5),
    ]


def live(root):
    counts = {"jp2k": 227, "jpeg": 233, "wn": 174, "gblur": 174, "fastfading": 174}
    total = sum(counts.values())
    undistorted = np.zeros(total)
    undistorted[1:] = 1
    undistorted[227] = undistorted[total - 1] = 0
    write_mat(
        root / "dmos_realigned.mat",
        dmos_new=np.arange(total)[None] / 10,
        orgs=undistorted[None],
    )
    write_mat(root / "refnames_all.mat", refnames_all=cells(*[f"r{i}.bmp" for i in range(total)]))
    kinds = [("jp2k", 1, 0), ("jpeg", 1, 227), ("fastfading", 174, total - 1)]
    return [
        Rated(f"{root}/{kind}/img{n}.bmp", 100 - i / 10, f"{root}/refimgs/r{i}.bmp", kind)
        for kind, n, i in kinds
    ]


CSIQ_HEADER = [None, None, None, "image", "dst_idx", "dst_type", "dst_lev", "dmos_std", "dmos"]


def csiq_items(root):
    touch(root, "dst_imgs/awgn/1600.AWGN.1.png", "dst_imgs/jpeg2000/trolley.jpeg2000.5.png")
    return [
        Rated(f"{root}/dst_imgs/awgn/1600.AWGN.1.png", 0.75, f"{root}/src_imgs/1600.png", "awgn"),
        Rated(
            f"{root}/dst_imgs/jpeg2000/trolley.jpeg2000.5.png",
            0.25,
            f"{root}/src_imgs/trolley.png",
            "jpeg2000",
        ),
    ]


def csiq_as_published(root):
    write_xlsx(
        root / "csiq.DMOS.xlsx",
        "all_by_image",
        ["CSIQ"],
        [],
        CSIQ_HEADER,
        [None, None, None, 1600, 1, "noise", 1, 0.1, 0.25],
        [None, None, None, "trolley", 5, "jpeg 2000", 5, 0.1, 0.75],
    )
    return csiq_items(root)


def csiq_as_csv(root):
    write_csv(
        root / "csiq.DMOS.csv",
        CSIQ_HEADER[3:],
        [1600, 1, "noise", 1, 0.1, 0.25],
        ["trolley", 5, "jpeg 2000", 5, 0.1, 0.75],
    )
    return csiq_items(root)


def tid2013(root):
    touch(root, "distorted_images/i01_08_2.bmp", "distorted_images/I25_24_5.BMP")
    touch(root, "reference_images/I01.BMP", "reference_images/i25.bmp")
    write_text(root / "mos_with_names.txt", "5.25000 i01_08_2.bmp", "1.50000 I25_24_5.bmp")
    blur, sparse = "08 Gaussian blur", "24 sparse sampling and reconstruction"
    distorted, references = f"{root}/distorted_images", f"{root}/reference_images"
    return [
        Rated(f"{distorted}/i01_08_2.bmp", 5.25, f"{references}/I01.BMP", blur),
        Rated(f"{distorted}/I25_24_5.BMP", 1.5, f"{references}/i25.bmp", sparse),
    ]


def kadid10k(root):
    write_csv(
        root / "dmos.csv",
        ["dist_img", "ref_img", "dmos", "var"],
        ["I01_01_01.png", "I01.png", 4.5, 0.5],
        ["I81_25_05.png", "I81.png", 1.25, 0.5],
    )
    images = f"{root}/images"
    return [
        Rated(f"{images}/I01_01_01.png", 4.5, f"{images}/I01.png", "01 Gaussian blur"),
        Rated(f"{images}/I81_25_05.png", 1.25, f"{images}/I81.png", "25 contrast change"),
    ]


def pieapp(root):
    touch(root, "distorted_images/test/ref_2/distort_2_gaussian_blur_inter_1.png")
    touch(root, "reference_images/test/ref_2.png")
    write_csv(
        root / "labels/test/ref_2_per_image_score.csv",
        ["ref. image", " dist. image", " per-image score"],
        ["ref_2.png", "distort_2_gaussian_blur_inter_1.png", 1.75],
        ["ref_2.png", "ref_2.png", 0],
    )
    write_csv(root / "labels/test/ref_2_pairwise_labels.csv", ["a", "b", "c", "d"])
    distorted = f"{root}/distorted_images/test/ref_2/distort_2_gaussian_blur_inter_1.png"
    reference = f"{root}/reference_images/test/ref_2.png"
    return [Rated(distorted, -1.75, reference, "gaussian_blur", "test")]


def pipal(root):
    touch(
        root, "Train_Dist/Distortion_1/A0001_00_00.bmp", "Train_Dist/Distortion_2/A0001_06_03.bmp"
    )
    write_text(root / "Train_Label/A0001.txt", "A0001_00_00.bmp,1500.5", "A0001_06_03.bmp,1320.25")
    reference = f"{root}/Train_Ref/A0001.bmp"
    first, second = f"{root}/Train_Dist/Distortion_1", f"{root}/Train_Dist/Distortion_2"
    return [
        Rated(f"{first}/A0001_00_00.bmp", 1500.5, reference, "00", "training"),
        Rated(f"{second}/A0001_06_03.bmp", 1320.25, reference, "06", "training"),
    ]


def konvid1k(root):
    touch(root, "KoNViD_1k_videos/3015.mp4")
    write_csv(
        root / "KoNViD_1k_metadata/KoNViD_1k_attributes.csv",
        ["flickr_id", "width", "mos"],
        [3015, 960, 3.25],
    )
    return [Rated(f"{root}/KoNViD_1k_videos/3015.mp4", 3.25)]


def konvid1k_older_names(root):
    name = "KoNViD_1k_videos/3015_cut_centercrop_960x540_8s.mp4"
    touch(root, name, "KoNViD_1k_videos/30151_cut.mp4")
    write_csv(root / "KoNViD_1k_mos.csv", ["flickr_id", "MOS"], [3015, 3.25])
    return [Rated(f"{root}/{name}", 3.25)]


def live_vqc(root):
    write_mat(root / "data.mat", video_list=cells("A001.mp4", "F003.mp4"), mos=[[80.5], [21.0]])
    return [Rated(f"{root}/Video/A001.mp4", 80.5), Rated(f"{root}/Video/F003.mp4", 21.0)]


def youtube_ugc_items(root):
    touch(root, "original_videos/Gaming/Gaming_720P-0a1b.mkv", "HDR_2160P-3c_crf_10.mp4")
    return [
        Rated(f"{root}/original_videos/Gaming/Gaming_720P-0a1b.mkv", 3.5, type="Gaming"),
        Rated(f"{root}/HDR_2160P-3c_crf_10.mp4", 4.25, type="HDR"),
    ]


def youtube_ugc_as_published(root):
    write_xlsx(
        root / "original_videos/MOS_for_YouTube_UGC_dataset.xlsx",
        "MOS",
        ["vid", "MOS full", "MOS range"],
        ["Gaming_720P-0a1b", 3.5, 0.1],
        ["HDR_2160P-3c", 4.25, 0.1],
        ["Sports_360P-4d", None, None],
    )
    return youtube_ugc_items(root)


def youtube_ugc_as_csv(root):
    write_csv(
        root / "original_videos_MOS_for_YouTube_UGC_dataset.csv",
        ["vid", "MOS full"],
        ["Gaming_720P-0a1b", 3.5],
        ["HDR_2160P-3c", 4.25],
        ["Sports_360P-4d", ""],
    )
    return youtube_ugc_items(root)


SAMPLES = [
    ("koniq10k", koniq10k_official),
    ("koniq10k", koniq10k_first_release),
    ("spaq", spaq_as_published),
    ("spaq", spaq_as_csv),
    ("flive", flive_images),
    ("flive", flive_with_patches),
    ("live_challenge", live_challenge),
    ("ava", ava),
    ("live", live),
    ("csiq", csiq_as_published),
    ("csiq", csiq_as_csv),
    ("tid2013", tid2013),
    ("kadid10k", kadid10k),
    ("pieapp", pieapp),
    ("pipal", pipal),
    ("konvid1k", konvid1k),
    ("konvid1k", konvid1k_older_names),
    ("live_vqc", live_vqc),
    ("youtube_ugc", youtube_ugc_as_published),
    ("youtube_ugc", youtube_ugc_as_csv),
]


@pytest.mark.parametrize(("layout", "sample"), SAMPLES, ids=lambda p: getattr(p, "__name__", p))
def test_every_rated_item_is_read_from_the_published_layout(tmp_path, layout, sample):
    expected = sample(tmp_path)
    found = datasets.read(str(tmp_path), layout)
    assert found.items == expected
    if found.mos_range:
        low, high = found.mos_range
        assert all(low <= item.mos <= high for item in found.items)


def test_every_layout_has_a_sample():
    assert {layout for layout, _ in SAMPLES} == set(datasets.LAYOUTS)


@pytest.mark.parametrize(
    ("layout", "sample"),
    [("live", live), ("csiq", csiq_as_csv), ("pieapp", pieapp)],
    ids=lambda p: getattr(p, "__name__", p),
)
def test_differences_are_turned_round_and_said_to_be(tmp_path, layout, sample):
    sample(tmp_path)
    assert datasets.read(str(tmp_path), layout).inverted


def test_kadids_dmos_is_taken_as_it_is_since_higher_is_better_in_it(tmp_path):
    kadid10k(tmp_path)
    assert not datasets.read(str(tmp_path), "kadid10k").inverted


@pytest.mark.parametrize("layout", datasets.LAYOUTS)
def test_in_another_folder_the_first_documented_file_is_missed_by_name(tmp_path, layout):
    with pytest.raises(CatalogError, match=str(tmp_path)) as error:
        datasets.read(str(tmp_path), layout)
    names = [w.rpartition("/")[2].strip(".:,") for w in str(error.value).split()]
    text = datasets.LAYOUTS[layout].__doc__
    assert any(name in text for name in names if "." in name and name != tmp_path.name)


def test_without_openpyxl_a_spreadsheet_says_how_to_go_on(tmp_path, monkeypatch):
    touch(tmp_path, "TestImage/1.jpg", "Annotations/MOS and Image attribute scores.xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(CatalogError, match=r"\[evaluate\].*\.csv"):
        datasets.read(str(tmp_path), "spaq")


def test_ratings_and_names_of_different_number_are_refused(tmp_path):
    write_mat(tmp_path / "data.mat", video_list=cells("A001.mp4", "A002.mp4"), mos=[[80.5]])
    with pytest.raises(CatalogError, match="different lengths"):
        datasets.read(str(tmp_path), "live_vqc")


def test_a_matlab_file_without_the_variable_says_what_it_has(tmp_path):
    write_mat(tmp_path / "data.mat", videos=[[1.0]])
    with pytest.raises(CatalogError, match=r"video_list.*videos"):
        datasets.read(str(tmp_path), "live_vqc")


def test_a_plain_csv_is_read_with_paths_beside_it_and_its_other_columns_kept(tmp_path):
    path = tmp_path / "ratings.csv"
    write_csv(
        path,
        ["uri", "mos", "reference_uri", "type", "split", "camera"],
        ["a.png", 1.5, "ref/a.png", "blur", "test", "X100"],
        ["s3://bucket/b.png", 2, "", "", "", ""],
        ["/abs/c.png", 3, "/abs/r.png", "", "train", ""],
    )
    assert datasets.read(str(path)).items == [
        Rated(
            f"{tmp_path}/a.png", 1.5, f"{tmp_path}/ref/a.png", "blur", "test", {"camera": "X100"}
        ),
        Rated("s3://bucket/b.png", 2.0),
        Rated("/abs/c.png", 3.0, "/abs/r.png", None, "train"),
    ]


def test_a_training_csv_is_read_too(tmp_path):
    write_csv(tmp_path / "mos.csv", ["image", "mos"], ["a.png", 1.5])
    assert datasets.read(str(tmp_path / "mos.csv")).items == [Rated(f"{tmp_path}/a.png", 1.5)]


def test_a_plain_csv_of_differences_is_turned_round(tmp_path):
    write_csv(tmp_path / "dmos.csv", ["uri", "dmos"], ["a.png", 10])
    found = datasets.read(str(tmp_path / "dmos.csv"))
    assert (found.items[0].mos, found.inverted) == (-10, True)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["uri,score", "a.png,1"], "`mos`"),
        (["uri,mos", "a.png,good"], "ratings.csv:2: 'good'"),
        (["uri,mos", "a.png,"], "ratings.csv:2"),
        (["uri,mos", "a.png,nan"], "nan"),
        (["uri,mos", ",1"], "ratings.csv:2: no uri"),
        (["uri,mos", "a.png,1", "a.png,2"], "rated twice"),
        (["uri,mos"], "no ratings"),
        ([""], "`uri`"),
    ],
)
def test_a_csv_that_cannot_be_used_says_where_and_why(tmp_path, lines, said):
    write_text(tmp_path / "ratings.csv", *lines)
    with pytest.raises(CatalogError) as error:
        datasets.read(str(tmp_path / "ratings.csv"))
    assert said in str(error.value)


def test_a_folder_without_a_layout_and_an_unknown_layout_list_the_layouts(tmp_path):
    with pytest.raises(CatalogError, match="koniq10k"):
        datasets.read(str(tmp_path))
    with pytest.raises(ConfigError, match="koniq10k"):
        datasets.read(str(tmp_path), "koniq")


def test_a_split_is_chosen_by_any_column():
    items = [
        Rated("a", 1, split="test"),
        Rated("b", 2, type="blur"),
        Rated("c", 3, extra={"camera": "X=1"}),
    ]
    assert [i.uri for i in datasets.select(items, "split=test")] == ["a"]
    assert [i.uri for i in datasets.select(items, "type=blur")] == ["b"]
    assert [i.uri for i in datasets.select(items, "camera=X=1")] == ["c"]


@pytest.mark.parametrize("condition", ["split=val", "lens=50", "split", "=test", "uri=a"])
def test_a_split_that_leaves_nothing_is_an_error_that_says_what_there_is(condition):
    with pytest.raises(ConfigError, match=r"test|no such column|COLUMN=VALUE"):
        datasets.select([Rated("a", 1, split="test")], condition)


def test_the_manifest_is_a_catalog_with_the_ratings_in_it(tmp_path):
    items = [
        Rated(f"{tmp_path}/a.png", 1.5, None, "blur", None, {"camera": "X100"}),
        Rated(f"{tmp_path}/b.png", 2.5, f"{tmp_path}/r.png"),
    ]
    pq.write_table(datasets.manifest(items), tmp_path / "ratings.parquet")
    found = read_catalog(str(tmp_path / "ratings.parquet")).table
    assert found["uri"].to_pylist() == [item.uri for item in items]
    assert found["mos"].to_pylist() == [1.5, 2.5]
    assert found["type"].to_pylist() == ["blur", None]
    assert found["camera"].to_pylist() == ["X100", None]
    assert found["reference_uri"].to_pylist() == [None, f"{tmp_path}/r.png"]
