"""Flickr8k in its three layouts.

- The original files, those of Kaggle and the table with splits are one data set: equal items, order, protocol ids.
- Neither the order of lines, white space, line ends nor a byte order mark changes it.
- Images that no list names are left out and counted; other counts than the published are told.
- Every faulty line is told with file and line, and counts as lost in its split where that is known.
- Captions without splits are an error that names the lists; no path leads out of the folder.
- A picture of test is in no other split, and rows with equal pictures are one image.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import flickr8k_layout, section, texts

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.doctor import check_dataset
from cmfg_dgl.data.formats.flickr8k import flickr8k
from cmfg_dgl.data.losses import lost_share, require_whole
from cmfg_dgl.errors import DataError

LAYOUTS = ("original", "kaggle", "table")
SPLITS = ("train", "val", "test")
IMAGES = [
    ("30_c.jpg", "test", [f"A dog , number {n} ." for n in range(5)]),
    ("4_a.jpg", "train", ['Two men say " hi " .', "a second", "ä third", "a fourth#1", "a fifth"]),
    ("200_b.jpg", "train", [f"a child with {n} balls" for n in range(5)]),
    ("1_z.jpg", "", [f"listed nowhere {n}" for n in range(5)]),
    ("5_d.jpg", "val", [f"snow , {n}" for n in range(5)]),
    ("6_e.jpg", "test", [f"water {n}" for n in range(4)]),
]
TOKENS = "Flickr8k_text/Flickr8k.token.txt"


def read(root: Path | None, **options: bool) -> Dataset:
    return flickr8k(section(root, name="flickr8k", **options))


def protocols(dataset: Dataset) -> list[str]:
    return [dataset.protocol(split) for split in SPLITS]


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def original(tmp_path: Path) -> Path:
    flickr8k_layout(tmp_path, "original", IMAGES)
    return tmp_path


def test_three_layouts_are_one_data_set(tmp_path: Path) -> None:
    read_as = {}
    for layout in LAYOUTS:
        flickr8k_layout(tmp_path / layout, layout, IMAGES)
        read_as[layout] = read(tmp_path / layout)
    wanted = sorted(image for image in IMAGES if image[1])
    for layout, dataset in read_as.items():
        assert [image.id for image in dataset.images] == [name for name, _, _ in wanted], layout
        assert texts(dataset) == {name: own for name, _, own in wanted}
        assert [c.id for c in dataset.captions] == [
            f"{name}#{n}" for name, _, own in wanted for n in range(len(own))
        ]
        for split in SPLITS:
            named = [name for name, home, _ in wanted if home == split]
            assert [dataset.images[i].id for i in dataset.splits[split]] == named
        assert (dataset.bad, dataset.published) == ((), True)
        assert dataset.load(dataset.images[0]).size == (24, 16)
        assert protocols(dataset) == protocols(read_as["original"])
    assert protocols(read_as["table"])[0].startswith("flickr8k/official/train/")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("folder", ["Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images", "."])
def test_pictures_may_lie_in_each_of_the_folders(tmp_path: Path, layout: str, folder: str) -> None:
    flickr8k_layout(tmp_path, layout, IMAGES)
    whole = protocols(read(tmp_path))
    pictures = list(tmp_path.rglob("*.jpg"))
    (tmp_path / "kept").mkdir()
    for path in pictures:
        path.rename(tmp_path / "kept" / path.name)
    for old in {path.parent for path in pictures} - {tmp_path}:
        old.rmdir()
    if folder == ".":
        for path in list((tmp_path / "kept").iterdir()):
            path.rename(tmp_path / path.name)
    else:
        (tmp_path / "kept").rename(tmp_path / folder)
    assert protocols(read(tmp_path)) == whole


def test_texts_may_lie_in_the_root_and_lists_in_their_folder(original: Path, tmp_path: Path) -> None:
    whole = protocols(read(original))
    (original / TOKENS).rename(original / "Flickr8k.token.txt")
    assert protocols(read(original)) == whole
    for path in list((original / "Flickr8k_text").iterdir()):
        path.rename(original / path.name)
    assert protocols(read(original)) == whole


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 999),
    newline=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
    end=st.text(" ", max_size=3),
)
def test_order_white_space_and_marks_change_nothing(
    original: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, newline: str, mark: bool, end: str
) -> None:
    whole, other = read(original), tmp_path_factory.mktemp("other") / "copy"
    shutil.copytree(original, other)
    for path in (other / "Flickr8k_text").iterdir():
        lines = path.read_text(encoding="utf-8").splitlines()
        random.Random(seed).shuffle(lines)
        text = newline.join(f"{line}{end}" for line in [*lines, ""])
        path.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
    again = read(other)
    assert protocols(again) == protocols(whole)
    assert again.captions == whole.captions


@pytest.mark.parametrize("layout", ["kaggle", "table"])
def test_line_ends_and_marks_of_tables_change_nothing(tmp_path: Path, layout: str) -> None:
    flickr8k_layout(tmp_path, layout, IMAGES)
    whole = protocols(read(tmp_path))
    (table,) = tmp_path.glob("captions.*")
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\r\n", b"\n"))
    assert protocols(read(tmp_path)) == whole


def test_what_no_list_names_is_counted_and_what_differs_is_told(original: Path) -> None:
    with (original / TOKENS).open("a") as file:
        file.writelines(f"2258277193_586949ec62.jpg.1#{n}\tno picture\n" for n in range(5))
    dataset = read(original)
    assert dataset.bad == ()
    assert dataset.notes == ("2 images are in no split: no list names them",)
    assert dataset.miscounts == (
        "the split train has 2 images, and 6,000 as published",
        "the split val has 1 images, and 1,000 as published",
        "the split test has 2 images, and 1,000 as published",
        "1 images have fewer or more captions than 5, as published",
    )
    findings = check_dataset(dataset)
    assert [f.message for f in findings if f.code == "counts-differ"] == list(dataset.miscounts)
    assert {f.code for f in findings if f.severity != "info"} == {"counts-differ"}


FAULTS = {
    "no tab": ("200_b.jpg#1\ta child", "200_b.jpg#1 a child", "Flickr8k.token.txt line 12", ""),
    "no number": ("200_b.jpg#1\t", "200_b.jpg\t", "Flickr8k.token.txt line 12", ""),
    "no caption": ("200_b.jpg#1\ta child with 1 balls", "200_b.jpg#1\t", "Flickr8k.token.txt line 12", "train"),
    "no caption and no tab": ("200_b.jpg#1\ta child with 1 balls", "200_b.jpg#1", "the caption is empty", "train"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_line_is_told_and_loses_one_pair(original: Path, fault: str) -> None:
    old, new, told, split = FAULTS[fault]
    change(original / TOKENS, old, new)
    dataset = read(original)
    (bad,) = dataset.bad
    assert told in bad.reason and (bad.split, bad.pairs) == (split, 1)
    assert len(texts(dataset)["200_b.jpg"]) == 4
    if split:
        assert lost_share(dataset, "train") == pytest.approx(1 / 10)
        require_whole(dataset, ["test"])
    with pytest.raises(DataError, match=r"line 12|caption is empty"):
        require_whole(dataset, ["train"])


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("picture", "30_c.jpg: Flickr_8k.testImages.txt line 1: there is no such file"),
        ("captions", "30_c.jpg: Flickr_8k.testImages.txt line 1: Flickr8k.token.txt has no caption of it"),
    ],
)
def test_a_listed_image_without_picture_or_captions_is_lost_with_its_five(
    original: Path, fault: str, told: str
) -> None:
    if fault == "picture":
        (original / "Flicker8k_Dataset/30_c.jpg").unlink()
    else:
        change(original / TOKENS, "30_c.jpg#", "31_c.jpg#")
    dataset = read(original)
    (bad,) = dataset.bad
    assert bad.reason.startswith(told)
    assert (bad.id, bad.split, bad.pairs) == ("30_c.jpg", "test", 5)
    assert lost_share(dataset, "test") == pytest.approx(5 / 9)
    require_whole(dataset, ["train", "val"])
    with pytest.raises(DataError, match=r"30_c\.jpg"):
        require_whole(dataset, ["test"])


@pytest.mark.parametrize(
    ("layout", "row", "told"),
    [
        ("kaggle", "4_a.jpg,one , two", "captions.txt line 31: 3 cells instead of 2"),
        ("table", "4_a.jpg,one", "captions.csv line 26: 2 cells instead of 3"),
        ("table", ",nobody,train", "captions.csv line 26: names no image"),
        ("kaggle", "4_a.jpg, ", "4_a.jpg#5: captions.txt line 31: the caption is empty"),
    ],
)
def test_a_faulty_row_of_a_table_is_told(tmp_path: Path, layout: str, row: str, told: str) -> None:
    flickr8k_layout(tmp_path, layout, IMAGES)
    whole = protocols(read(tmp_path))
    (table,) = tmp_path.glob("captions.*")
    table.write_bytes(table.read_bytes() + f"{row}\r\n".encode())
    dataset = read(tmp_path)
    (bad,) = dataset.bad
    assert bad.reason.startswith(told) and bad.pairs == 1
    assert protocols(dataset) == whole


def test_an_image_of_two_lists_is_in_none(original: Path) -> None:
    with (original / "Flickr8k_text/Flickr_8k.trainImages.txt").open("a") as file:
        file.write("30_c.jpg\n")
    (bad,) = read(original).bad
    assert "its rows name different splits: test, train" in bad.reason and bad.pairs == 5


def test_captions_without_splits_ask_for_the_lists(tmp_path: Path) -> None:
    flickr8k_layout(tmp_path, "kaggle", IMAGES)
    (tmp_path / "Flickr_8k.devImages.txt").unlink()
    with pytest.raises(DataError, match=r"captions\.txt names no splits and there is no Flickr_8k\.devImages\.txt"):
        read(tmp_path)
    for path in tmp_path.glob("Flickr_8k.*"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"trainImages\.txt, .*devImages\.txt, .*testImages\.txt; put .*beside"
    ) as told:
        read(tmp_path)
    assert "\n" not in str(told.value)
    (tmp_path / "captions.txt").unlink()
    with pytest.raises(DataError, match=r"no Flickr8k\.token\.txt, captions\.txt, captions\.csv; set data\.root"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"data\.root is not set"):
        read(None)


def test_of_several_files_of_captions_the_original_is_read(original: Path) -> None:
    whole = read(original)
    (original / "captions.txt").write_text("image,caption\n4_a.jpg,another\n")
    dataset = read(original)
    assert protocols(dataset) == protocols(whole)
    assert "captions are those of Flickr8k.token.txt; captions.txt is not read" in dataset.notes


def test_an_empty_split_is_an_error(original: Path) -> None:
    (original / "Flicker8k_Dataset/5_d.jpg").unlink()
    with pytest.raises(DataError, match=r"no usable image in val \(1 images refused, the first: 5_d.*no such file"):
        read(original)


@pytest.mark.parametrize("whole_folder", [True, False])
def test_links_lead_out_where_they_may(
    original: Path, tmp_path_factory: pytest.TempPathFactory, whole_folder: bool
) -> None:
    whole, elsewhere = protocols(read(original)), tmp_path_factory.mktemp("elsewhere") / "x"
    linked = original / "Flicker8k_Dataset"
    linked = linked if whole_folder else linked / "200_b.jpg"
    linked.rename(elsewhere)
    linked.symlink_to(elsewhere)
    assert protocols(read(original, follow_links=True)) == whole
    if whole_folder:
        with pytest.raises(DataError, match="a link that leads out"):
            read(original)
        elsewhere.rename(original / "within")
        linked.unlink()
        linked.symlink_to(original / "within")
        assert protocols(read(original)) == whole
    else:
        (bad,) = read(original).bad
        assert "a link that leads out" in bad.reason
    change(original / "Flickr8k_text/Flickr_8k.trainImages.txt", "200_b.jpg", "../200_b.jpg")
    change(original / TOKENS, "200_b.jpg", "../200_b.jpg")
    assert any("leads out of data.root" in bad.reason for bad in read(original, follow_links=True).bad)


def test_equal_pictures_are_one_image_and_a_picture_of_test_is_in_no_other_split(original: Path) -> None:
    pictures, whole = original / "Flicker8k_Dataset", texts(read(original))
    shutil.copyfile(pictures / "4_a.jpg", pictures / "200_b.jpg")
    dataset = read(original)
    assert texts(dataset) == {
        name: own if name != "200_b.jpg" else [*own, *whole["4_a.jpg"]]
        for name, own in whole.items()
        if name != "4_a.jpg"
    }
    assert any("1 pictures are one image each" in note for note in dataset.notes)
    assert not any("split train has 1 " in line for line in dataset.miscounts), (
        "counted as published, before merging"
    )
    shutil.copyfile(pictures / "30_c.jpg", pictures / "200_b.jpg")
    dataset = read(original)
    assert [dataset.images[i].id for i in dataset.splits["train"]] == ["4_a.jpg"]
    assert [dataset.images[i].id for i in dataset.splits["test"]] == ["30_c.jpg", "6_e.jpg"]
    assert "1 images of train or val are in no split: val or test has the same picture" in dataset.notes
