"""A folder of one's own images.

- The three kinds of listing say the same; more than one of them, or none, is an error.
- What is bad is listed with its reason, and nothing else is lost with it.
- No path leads out of the folder, but links where they may.
- Texts without a picture that is read, columns and keys that come twice, and split names that are none are told;
  only line feeds end a caption; what cmfg wrote is no picture.
- Every image is in exactly one split, no normalised caption or digest in two; neither the order of rows
  and files nor unrelated images move an image.
"""

from __future__ import annotations

import json
import os
import random
import re
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import section
from PIL import Image

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.formats.folder import folder
from cmfg_dgl.data.splits import normalise_caption
from cmfg_dgl.errors import DataError
from cmfg_dgl.ownership import claim, write_owned

FRACTIONS = {"train": 0.6, "val": 0.1, "test": 0.3}


def read(root: Path | None, **options: object) -> Dataset:
    return folder(section(root, **options))


def draw(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade % 256, shade // 256, 99)).save(path)


def texts(dataset: Dataset) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {image.id: [] for image in dataset.images}
    for caption in dataset.captions:
        found[dataset.images[caption.image].id].append(caption.text)
    return found


def bad(dataset: Dataset) -> dict[str, str]:
    return {item.id: item.reason for item in dataset.bad}


def homes(dataset: Dataset) -> dict[str, str]:
    return {dataset.images[i].id: name for name, where in dataset.splits.items() for i in where.tolist()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    draw(tmp_path / "b.png", 1)
    draw(tmp_path / "a.jpg", 2)
    draw(tmp_path / "sub" / "c.png", 3)
    return tmp_path


ROWS = [
    ("b.png", "a dog, running"),
    ("a.jpg", "ein Käse"),
    ("b.png", "two dogs"),
    ("sub/c.png", 'a 12" pizza'),
]
WANTED = {"a.jpg": ["ein Käse"], "b.png": ["a dog, running", "two dogs"], "sub/c.png": ['a 12" pizza']}


def as_csv(rows: list[tuple[str, str]]) -> str:
    return "image,caption\n" + "".join('{},"{}"\n'.format(i, c.replace('"', '""')) for i, c in rows)


def as_jsonl(rows: list[tuple[str, str]]) -> str:
    return "".join(json.dumps({"image": i, "caption": c}) + "\n" for i, c in rows)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "jsonl-lists", "txt"])
def test_the_three_kinds_say_the_same(root: Path, kind: str, bom: bytes, newline: str) -> None:
    if kind == "csv":
        files = {"captions.csv": as_csv(ROWS)}
    elif kind == "jsonl":
        files = {"captions.jsonl": as_jsonl(ROWS)}
    elif kind == "jsonl-lists":
        lines = (json.dumps({"image": i, "captions": c}, ensure_ascii=False) for i, c in WANTED.items())
        files = {"captions.jsonl": "\n".join(lines)}
    else:
        files = {str(Path(i).with_suffix(".txt")): "\n".join(c) + "\n" for i, c in WANTED.items()}
    for name, text in files.items():
        (root / name).write_bytes(bom + text.replace("\n", newline).encode())
    dataset = read(root)
    assert texts(dataset) == WANTED
    assert list(texts(dataset)) == sorted(WANTED)
    assert [c.id for c in dataset.captions] == ["a.jpg#0", "b.png#0", "b.png#1", "sub/c.png#0"]
    assert dataset.bad == ()
    assert dataset.rule == "hash-60-10-30,seed-0,near-0.75"
    assert dataset.load(dataset.images[0]).size == (8, 8)


def test_two_kinds_or_none_are_an_error(root: Path) -> None:
    with pytest.raises(DataError, match="no captions; write"):
        read(root)
    (root / "captions.csv").write_text(as_csv(ROWS))
    (root / "captions.jsonl").write_text(as_jsonl(ROWS))
    with pytest.raises(DataError, match=r"captions\.csv and in captions\.jsonl"):
        read(root)
    (root / "captions.jsonl").unlink()
    (root / "sub" / "c.txt").write_text("a pizza")
    with pytest.raises(DataError, match=r"captions\.csv and in sub/c\.txt"):
        read(root)


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "b.txt"])
def test_not_utf8_names_file_and_line(root: Path, name: str) -> None:
    (root / name).write_bytes(b"image,caption\r\nb.png,fine\r\na.jpg,K\xe4se\r\n")
    with pytest.raises(DataError, match=rf"{name} line 3: not UTF-8"):
        read(root)


@pytest.mark.parametrize("value", [None, "missing", "b.png"])
def test_a_root_that_is_none(root: Path, value: str | None) -> None:
    with pytest.raises(DataError, match=r"data\.root"):
        read(root / value if value else None)


def test_no_usable_pair_is_an_error_with_the_remedy(root: Path) -> None:
    (root / "captions.csv").write_text("image,caption\nb.png,\n")
    with pytest.raises(DataError, match=r"no image with a caption \(4 refused, the first: b\.png#0: .*write"):
        read(root)


def test_labels_and_given_splits(root: Path) -> None:
    (root / "captions.csv").write_text(
        "Image,Caption,labels,split\nb.png,x y,dog; park,train\nb.png,z,cat|dog,train\na.jpg,q,,test\n"
        "sub/c.png,r,;,test\n"
    )
    dataset = read(root)
    assert [image.labels for image in dataset.images] == [(), ("cat", "dog", "park"), ()]
    assert dataset.rule == "given"
    assert homes(dataset) == {"a.jpg": "test", "b.png": "train", "sub/c.png": "test"}
    assert dataset.bad == ()


def test_splits_that_disagree_or_lack_are_bad(root: Path) -> None:
    (root / "captions.csv").write_text(
        "image,caption,split\nb.png,x,train\nb.png,y,test\na.jpg,q,\nsub/c.png,r,val\nsub/c.png,s,\n"
    )
    dataset = read(root)
    assert homes(dataset) == {"sub/c.png": "val"}
    assert "test, train" in bad(dataset)["b.png"]
    assert "no split" in bad(dataset)["a.jpg"]
    assert len(dataset.bad) == 2


def test_bad_rows_of_csv_lose_nothing_else(root: Path) -> None:
    (root / "captions.csv").write_text(
        "image,caption\nb.png,one\nb.png,  \nb.png,a, b\n\nb.png,two\n,lost\ngone.png,x\na.jpg,\nsub/c.png,c\n"
    )
    dataset = read(root)
    assert texts(dataset) == {"b.png": ["one", "two"], "sub/c.png": ["c"]}
    assert [c.id for c in dataset.captions] == ["b.png#0", "b.png#2", "sub/c.png#0"]
    reasons = bad(dataset)
    assert set(reasons) == {
        "b.png#1", "captions.csv line 4", "captions.csv line 7", "gone.png", "a.jpg#0", "a.jpg",
    }  # fmt: skip
    assert "captions.csv line 3" in reasons["b.png#1"]
    assert "empty" in reasons["b.png#1"]
    assert "no such file" in reasons["gone.png"]
    assert "no caption" in reasons["a.jpg"]


def test_bad_rows_of_jsonl_lose_nothing_else(root: Path) -> None:
    lines = [
        '{"image": "b.png", "captions": ["one", 7, "", "\\ud800", "two"], "labels": ["x"], "split": ""}',
        '{"image": "b.png", "caption": ',
        '["b.png"]',
        '{"image": "b.png"}',
        '{"image": "b.png", "caption": "x", "captions": []}',
        '{"image": "b.png", "captions": "x"}',
        '{"image": 3, "caption": "x"}',
        '{"image": "b.png", "caption": "x", "labels": "x"}',
        "[" * 100_000,
        '{"image": "a.jpg", "caption": "three\u2028four", "url": "ignored"}',
    ]
    (root / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    dataset = read(root)
    assert texts(dataset) == {"a.jpg": ["three\u2028four"], "b.png": ["one", "two"]}
    expected = {f"captions.jsonl line {i}" for i in range(2, 10)} | {f"b.png#{i}" for i in (1, 2, 3)}
    assert set(bad(dataset)) == expected | {"sub/c.png"}
    assert all("\n" not in reason for reason in bad(dataset).values())
    dataset.protocol(next(name for name, where in dataset.splits.items() if len(where)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no columns"),
        ("file,text\na,b\n", "line 1: no columns"),
        ("image;caption\na;b\n", "line 1: no columns"),
        ("image,caption,label\na,b,c\n", "did you mean 'labels'"),
        ('image,caption\nb.png,fine\na.jpg,"never closed\n', "captions.csv line 3"),
        (
            "image,caption\nb.png," + "x" * 200_000,
            "captions.csv line 2: field larger than field limit (131072); close the",
        ),
    ],
)
def test_a_csv_that_cannot_be_read_as_a_whole(root: Path, text: str, message: str) -> None:
    (root / "captions.csv").write_text(text)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        read(root)
    assert "\n" not in str(error.value)


def test_no_path_leads_out(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    draw(outside / "secret.png")
    (outside / "secret.txt").write_text("secret")
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "door").symlink_to(outside)
    (root / "loop.png").symlink_to("loop.png")
    (root / "inner.png").symlink_to("b.png")
    up = f"../{outside.name}/secret.png"
    names = [up, str(outside / "secret.png"), "link.png", "door/secret.png", "loop.png", "sub/../b.png",
             "sub", "nul\0.png", "x" * 5000 + ".png"]  # fmt: skip
    rows = [
        *ROWS,
        ("inner.png", "a dog, running"),
        ("./sub//c.png", "again"),
        *((name, "x") for name in names),
    ]
    (root / "captions.jsonl").write_text(as_jsonl(rows))
    dataset = read(root)
    assert set(bad(dataset)) == set(names)
    assert texts(dataset) == {
        **WANTED,
        "b.png": [*WANTED["b.png"], "a dog, running"],  # of inner.png, which is the same picture
        "sub/c.png": [*WANTED["sub/c.png"], "again"],
    }
    for name in (up, str(outside / "secret.png"), "link.png", "door/secret.png", "sub/../b.png"):
        assert "leads out of data.root" in bad(dataset)[name]
    assert {caption.id for caption in dataset.captions} >= {"b.png#1", "inner.png#0"}


def test_a_text_that_links_out_is_not_read(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret.txt"
    outside.write_text("secret")
    (root / "a.txt").symlink_to(outside)
    (root / "b.txt").write_text("a dog\n\n\ntwo dogs\n")
    dataset = read(root)
    assert texts(dataset) == {"b.png": ["a dog", "two dogs"]}
    assert set(bad(dataset)) == {"a.txt", "a.jpg", "sub/c.png"}


def test_a_file_name_that_is_no_utf8_is_named(root: Path) -> None:
    (root / os.fsdecode(b"k\xe4se.png")).write_bytes((root / "b.png").read_bytes())
    (root / "captions.csv").write_text(as_csv(ROWS), encoding="utf-8")
    dataset = read(root)
    assert texts(dataset) == WANTED
    assert set(bad(dataset)) == {"k\\udce4se.png"}


def test_hidden_files_are_passed_over(root: Path) -> None:
    draw(root / ".cache" / "d.png")
    (root / "._b.png").write_bytes(b"x")
    (root / "captions.csv").write_text(as_csv(ROWS), encoding="utf-8")
    assert read(root).bad == ()


LINKED = {"csv": "captions.csv", "beside": "b.txt"}


@pytest.mark.parametrize("kind", LINKED)
def test_links_that_lead_out_may_be_followed(
    root: Path, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    draw(outside / "far.png", 7)
    (outside / "far.txt").write_text("far away")
    (outside / "back").symlink_to(root)
    (root / "link.png").symlink_to(outside / "far.png")
    (root / "folder").symlink_to(outside)
    if kind == "csv":
        draw(outside / "other.png", 8)
        (root / "captions.csv").write_text(as_csv([("link.png", "far away"), ("folder/other.png", "another")]))
        (outside / "far.txt").unlink()
        wanted = {"folder/other.png": ["another"], "link.png": ["far away"]}
    else:
        (root / "b.txt").write_text("near")
        (root / "link.txt").symlink_to(outside / "far.txt")
        wanted = {"b.png": ["near"], "folder/far.png": ["far away", "far away"]}
    if kind == "csv":
        with pytest.raises(DataError, match=r"link\.png: captions\.csv line 2: .*data\.follow_links=true"):
            read(root)
    else:
        assert "data.follow_links=true" in bad(read(root))["link.png"]
    dataset = read(root, follow_links=True)
    assert texts(dataset) == wanted
    assert all(dataset.load(image).size == (8, 8) for image in dataset.images)
    with pytest.raises(DataError):
        (root / "captions.csv").write_text(as_csv([("../outside.png", "x")]))
        read(root, follow_links=True)


UNREAD = ("pear.jfif", "pear.avif", "pear.HEIC", None)


@pytest.mark.parametrize("picture", UNREAD)
def test_a_text_without_a_picture_that_is_read_is_named(root: Path, picture: str | None) -> None:
    (root / "b.txt").write_text("a dog")
    (root / "pear.txt").write_text("a pear\n\nanother pear\n")
    (root / "README.txt").write_text("about this folder")
    if picture:
        (root / picture).write_bytes(b"x")
    dataset = read(root)
    assert texts(dataset) == {"b.png": ["a dog"]}
    found = {item.id: item for item in dataset.bad}
    assert set(found) == {"pear.txt", "a.jpg", "sub/c.png"}
    assert found["pear.txt"].pairs == 2 and found["a.jpg"].pairs == 0
    assert (picture or "no picture") in found["pear.txt"].reason and ".webp" in found["pear.txt"].reason


def test_texts_beside_pictures_of_other_formats_alone(root: Path) -> None:
    for name in ("a.jpg", "b.png", "sub/c.png"):
        (root / name).rename((root / name).with_suffix(".avif"))
        (root / name).with_suffix(".txt").write_text("words")
    with pytest.raises(
        DataError, match=r"3 refused, the first: a\.txt: captions beside a\.avif; pictures are read"
    ):
        read(root)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_line_feeds_end_a_caption(root: Path, end: str) -> None:
    captions = ["one\u2028two", "three\u0085four", "five\x0csix\x1cseven", "eight\x0bnine"]
    (root / "b.txt").write_bytes(end.join(captions).encode())
    assert texts(read(root)) == {"b.png": captions}


@pytest.mark.parametrize("column", ["image", "caption", "labels", "split"])
def test_a_column_that_comes_twice_is_refused(root: Path, column: str) -> None:
    (root / "captions.csv").write_text(f"image,caption,labels,split,{column.title()}\nb.png,one,,,two\n")
    with pytest.raises(DataError, match=rf"captions\.csv line 1: the column {column} comes twice"):
        read(root)


def test_a_key_that_comes_twice_is_refused(root: Path) -> None:
    lines = ['{"image": "b.png", "caption": "one", "caption": "two"}', '{"image": "a.jpg", "caption": "three"}']
    (root / "captions.jsonl").write_text("\n".join(lines))
    dataset = read(root)
    assert texts(dataset) == {"a.jpg": ["three"]}
    assert "the key 'caption' comes twice" in bad(dataset)["captions.jsonl line 1"]


def test_what_cmfg_wrote_is_passed_over(root: Path) -> None:
    (root / "captions.csv").write_text(as_csv(ROWS), encoding="utf-8")
    claim(root / "runs" / "one")
    draw(root / "runs" / "one" / "tb" / "sprite.png", 50)
    write_owned(root, "curves.png", b"of a bench whose folder this is")
    write_owned(root, "notes.txt", b"too")
    assert read(root).bad == () and texts(read(root)) == WANTED
    draw(root / "runs" / "mine.png", 51)
    assert set(bad(read(root))) == {"runs/mine.png"}


def test_split_names(root: Path) -> None:
    rows = "image,caption,split\nb.png,x,Train\na.jpg,y,validation\nsub/c.png,z,TESTING\n"
    (root / "captions.csv").write_text(rows)
    assert homes(read(root)) == {"a.jpg": "val", "b.png": "train", "sub/c.png": "test"}
    (root / "captions.csv").write_text(rows.replace("TESTING", "holdout"))
    with pytest.raises(DataError, match=r"captions\.csv line 4: no split is called 'holdout'; call it train, val"):
        read(root)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bad_folder(root: Path) -> None:
    """Ten good images with two captions each, and one of each thing that goes wrong."""
    lines = ["image,caption"]
    for i in range(10):
        draw(root / f"good{i}.png", i)
        lines += [f"good{i}.png,thing {i} seen from afar {i}", f"good{i}.png,close view of number{i}"]
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    Image.fromarray(noise).save(root / "truncated.jpg")
    whole = (root / "truncated.jpg").read_bytes()
    (root / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.png").write_text("I am a text")
    (root / "bomb.png").write_bytes(png_header(30_000, 30_000))
    lines += [f"{name},the {name} one" for name in ("truncated.jpg", "empty.jpg", "text.png", "bomb.png")]
    lines.append("good3.png,")
    (root / "captions.csv").write_text("\n".join(lines) + "\n")


def test_the_bad_folder_refuses_just_what_is_bad(tmp_path: Path) -> None:
    bad_folder(tmp_path)
    dataset = read(tmp_path, max_pixels=64_000_000)
    assert set(bad(dataset)) == {"good3.png#2"}
    assert len(dataset.images) == 14
    refused = {}
    for image in dataset.images:
        try:
            assert dataset.load(image).size == (8, 8)
        except DataError as error:
            refused[image.id] = str(error)
    assert set(refused) == {"truncated.jpg", "empty.jpg", "text.png", "bomb.png"}
    assert all(name in message for name, message in refused.items())
    assert len(dataset.captions) == 24


@st.composite
def listings(draw_from: st.DrawFn) -> list[tuple[str, str]]:
    """Rows over up to eight files, of which files 2k and 2k + 1 hold the same picture for k < 2."""
    names = [f"{i}.png" for i in draw_from(st.sets(st.integers(0, 7), min_size=1))]
    words = st.lists(st.sampled_from(["a", "b", "C", "d!", "e"]), min_size=1, max_size=4).map(" ".join)
    rows = [(name, text) for name in names for text in draw_from(st.lists(words, min_size=1, max_size=3))]
    return draw_from(st.permutations(rows))


def make(root: Path, rows: list[tuple[str, str]]) -> None:
    for name in sorted({name for name, _ in rows}):
        number = int(name.removesuffix(".png"))
        draw(root / name, number // 2 if number < 4 else number)
    (root / "captions.csv").write_text(as_csv(rows))


@given(listings(), st.integers(0, 3), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_splits_are_disjoint_and_stable(rows: list[tuple[str, str]], seed: int, shuffle: random.Random) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        make(Path(one), rows)
        dataset = read(Path(one), seed=seed)
        members = np.concatenate(list(dataset.splits.values()))
        assert sorted(members.tolist()) == list(range(len(dataset.images)))
        home = homes(dataset)
        digest = {image.id: image.sha256 for image in dataset.images}
        group = {image.id: number for image, number in zip(dataset.images, dataset.groups.tolist(), strict=True)}
        assert len({(group[name], home[name]) for name in home}) == len(set(group.values()))
        for text, name in ((t, n) for n, ts in texts(dataset).items() for t in ts):
            for text2, name2 in ((t, n) for n, ts in texts(dataset).items() for t in ts):
                if normalise_caption(text) == normalise_caption(text2) or digest[name] == digest[name2]:
                    assert group[name] == group[name2]

        unrelated = [(f"{i}.png", f"word{i} other{i}") for i in range(100, 110)]
        more = rows + unrelated
        shuffle.shuffle(more)
        make(Path(other), more)
        after = homes(read(Path(other), seed=seed))
        assert {name: after[name] for name in home} == home


def test_reading_twice_gives_the_same_protocol(root: Path) -> None:
    (root / "captions.csv").write_text(as_csv(ROWS), encoding="utf-8")
    one, two = (read(root, fractions={"all": 1.0}).protocol("all") for _ in range(2))
    assert one == two
    draw(root / "b.png", 77)
    assert read(root, fractions={"all": 1.0}).protocol("all") != one
