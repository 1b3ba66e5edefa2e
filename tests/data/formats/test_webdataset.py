"""WebDataset shards.

- A sample is the files of one key; its image is decoded as from a file of its own, whatever its oddities.
- Captions come from KEY.txt before KEY.json, whatever ends the lines; other files are passed over; order is kept.
- Every kind of bad sample is told with its shard and name, and loses itself alone; a damaged shard is an error.
- Nothing is extracted: not a file is written, and no name or link leads out.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import jpeg, section, tar_bytes, texts
from PIL import Image

from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.formats.webdataset import webdataset
from cmfg_dgl.data.images import decode
from cmfg_dgl.errors import DataError


def read(root: Path | None, **options: object) -> Dataset:
    return webdataset(section(root, **options))


def shard(path: Path, *files: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files))
    return path


def as_json(**record: object) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


FILES = [
    ("000.jpg", jpeg(0)),
    ("000.txt", "ein Käse".encode()),
    ("000.json", as_json(caption="not this one", url="http://x")),
    ("000.cls", b"7"),
    ("000.seg.png", b"a mask"),
    ("deep/er/001.json", as_json(caption="a dog", key="001")),
    ("deep/er/001.JPG", jpeg(1)),
    ("002.v1.txt", b"no caption, for its suffix is .v1.txt"),
    ("002.json", as_json(caption=["two", "zwei"])),
    ("002.webp", jpeg(2)),
    ("._000.jpg", b"of a file manager"),
    ("README", b"no sample"),
]
WANTED = {
    "s.tar/000.jpg": ["ein Käse"],
    "s.tar/deep/er/001.JPG": ["a dog"],
    "s.tar/002.webp": ["two", "zwei"],
}


def test_samples_of_a_shard(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", *FILES)
    before = path.read_bytes()
    for root in (path, tmp_path):
        dataset = read(root)
        assert texts(dataset) == WANTED
        assert list(texts(dataset)) == list(WANTED)
        assert dataset.bad == ()
        assert [c.id for c in dataset.captions][-2:] == ["s.tar/002.webp#0", "s.tar/002.webp#1"]
        assert [i.sha256 for i in dataset.images] == [hashlib.sha256(jpeg(n)).hexdigest() for n in range(3)]
        assert dataset.rule == "hash-60-10-30,seed-0,near-0.75"
        for number, item in enumerate(dataset.images):
            assert dataset.load(item).tobytes() == decode(jpeg(number), "x").tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["s.tar"] and path.read_bytes() == before


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_lines_of_a_text_are_captions(tmp_path: Path, newline: str, bom: bytes) -> None:
    text = bom + newline.join(["one", " two ", "drei ü", ""]).encode()
    shard(tmp_path / "s.tar", ("0.jpg", jpeg(0)), ("0.txt", text))
    assert texts(read(tmp_path)) == {"s.tar/0.jpg": ["one", "two", "drei ü"]}


def test_only_line_feeds_end_a_caption(tmp_path: Path) -> None:
    captions = ["one\u2028two", "three\u0085four\x0cfive"]
    shard(tmp_path / "s.tar", ("0.jpg", jpeg(0)), ("0.txt", "\n".join(captions).encode()))
    assert texts(read(tmp_path)) == {"s.tar/0.jpg": captions}


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def test_odd_pictures_are_seen_as_a_person_sees_them(tmp_path: Path) -> None:
    left = Image.new("RGB", (16, 8), "white")
    left.paste((255, 0, 0), (0, 0, 8, 8))
    upright = Image.Exif()
    upright[0x0112] = 6
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 255, 0])
    pictures = {
        "exif.jpg": encode(left, "JPEG", exif=upright, quality=95),
        "cmyk.jpg": encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=95),
        "palette.png": encode(palette, "PNG", transparency=0),
        "gif.gif": encode(
            Image.new("L", (4, 4), 255), "GIF", save_all=True, append_images=[Image.new("L", (4, 4))]
        ),
        "deep.png": encode(Image.fromarray(np.full((4, 4), 0x8080, np.uint16)), "PNG"),
        "grey.png": encode(Image.new("L", (4, 4), 77), "PNG"),
    }
    files = [
        pair for name, data in pictures.items() for pair in ((name, data), (f"{name[:-4]}.txt", name.encode()))
    ]
    dataset = read(shard(tmp_path / "s.tar", *files))
    seen = {item.id.removeprefix("s.tar/"): dataset.load(item) for item in dataset.images}
    assert seen["exif.jpg"].size == (8, 16)
    corners = {name: np.asarray(image)[0, 0].tolist() for name, image in seen.items()}
    assert np.allclose(corners["exif.jpg"], (255, 0, 0), atol=6)
    assert np.allclose(corners["cmyk.jpg"], (255, 0, 0), atol=6)
    assert [corners[name] for name in ("palette.png", "gif.gif", "deep.png", "grey.png")] == [
        [255] * 3, [255] * 3, [128] * 3, [77] * 3,
    ]  # fmt: skip


@pytest.mark.parametrize("by_folder", [True, False])
def test_shards_name_their_splits(tmp_path: Path, by_folder: bool) -> None:
    for number, split in enumerate(["train", "train", "val", "test"]):
        path = tmp_path / (f"{split}/{number}.tar" if by_folder else f"flickr-{split}-{number:06}.tar")
        shard(path, (f"{number}.jpg", jpeg(number)), (f"{number}.txt", b"the same words"))
    shard(tmp_path / "elsewhere" / "9.tar", ("9.jpg", jpeg(9)), ("9.txt", b"not looked at"))
    dataset = read(tmp_path)
    homes = {dataset.images[i].id[-5:-4]: name for name, where in dataset.splits.items() for i in where.tolist()}
    assert homes == {"0": "train", "1": "train", "2": "val", "3": "test"}
    assert (dataset.rule, dataset.published, len(dataset.images)) == ("given", True, 4)


def test_keys_of_two_shards_are_two_samples(tmp_path: Path) -> None:
    for number in range(2):
        shard(tmp_path / f"{number}.tar", ("0.jpg", jpeg(number)), ("0.txt", f"shard {number}".encode()))
    dataset = read(tmp_path)
    assert texts(dataset) == {"0.tar/0.jpg": ["shard 0"], "1.tar/0.jpg": ["shard 1"]}
    assert [dataset.load(item).tobytes() for item in dataset.images] == [
        decode(jpeg(number), "x").tobytes() for number in range(2)
    ]


BAD: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no image": ([("b.txt", b"words")], "0 images in the sample"),
    "two images": ([("b.txt", b"words"), ("b.png", jpeg(1)), ("b.jpg", jpeg(2))], "2 images in the sample"),
    "no caption": ([("b.jpg", jpeg(1)), ("b.cls", b"1")], "no KEY.txt and no KEY.json"),
    "no key": ([("b.jpg", jpeg(1)), ("b.json", as_json(url="x"))], "KEY.json has no caption"),
    "null": ([("b.jpg", jpeg(1)), ("b.json", as_json(caption=None))], "KEY.json has no caption"),
    "number": ([("b.jpg", jpeg(1)), ("b.json", as_json(caption=7))], "the caption is not a text"),
    "list": ([("b.jpg", jpeg(1)), ("b.json", b"[]")], "KEY.json has no caption"),
    "no JSON": ([("b.jpg", jpeg(1)), ("b.json", b"{")], "KEY.json is not JSON"),
    "nested": ([("b.jpg", jpeg(1)), ("b.json", b"[" * 100_000)], "KEY.json is not JSON"),
    "surrogate": ([("b.jpg", jpeg(1)), ("b.json", b'{"caption": "\\ud800"}')], "half of a surrogate pair"),
    "blank": ([("b.jpg", jpeg(1)), ("b.txt", b" \r\n")], "the caption is empty"),
    "latin": ([("b.jpg", jpeg(1)), ("b.txt", b"K\xe4se")], "KEY.txt is not UTF-8 at byte 1"),
    "long": ([("b.jpg", jpeg(1)), ("b.txt", b"x" * ((1 << 20) + 1))], "KEY.txt is larger than 1,048,576 bytes"),
    "out": ([("../b.jpg", jpeg(1)), ("../b.txt", b"words")], "leads out of the archive"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_sample_is_told_and_loses_itself_alone(tmp_path: Path, what: str) -> None:
    files, reason = BAD[what]
    dataset = read(shard(tmp_path / "s.tar", *FILES[:5], *files, *FILES[5:]))
    assert texts(dataset) == WANTED
    assert dataset.bad and all(item.reason.startswith("s.tar/") for item in dataset.bad)
    assert any(reason in item.reason for item in dataset.bad)
    assert all("\n" not in item.reason for item in dataset.bad)


def test_a_name_that_comes_twice(tmp_path: Path) -> None:
    dataset = read(shard(tmp_path / "s.tar", *FILES, ("000.jpg", jpeg(9))))
    assert texts(dataset) == WANTED
    assert [item.reason for item in dataset.bad] == ["s.tar/000.jpg: comes twice in the shard"]
    assert dataset.load(dataset.images[0]).tobytes() == decode(jpeg(0), "x").tobytes()


def test_links_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg(5))
    path = shard(tmp_path / "data" / "s.tar", *FILES)
    with tarfile.open(path, "a") as archive:
        for name, kind, target in (
            ("9.jpg", tarfile.SYMTYPE, str(tmp_path / "secret.jpg")),
            ("8.jpg", tarfile.LNKTYPE, "000.jpg"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    dataset = read(path)
    assert texts(dataset) == WANTED
    assert [item.id for item in dataset.bad] == ["s.tar/9.jpg", "s.tar/8.jpg"]
    assert all("links are not followed" in item.reason for item in dataset.bad)


def test_bounds_hold(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", *FILES)
    size = len(jpeg(0))
    item = read(path).images[0]
    assert read(path, max_bytes=size, max_pixels=24 * 16).load(item).size == (24, 16)
    with pytest.raises(DataError, match=r"s\.tar: s\.tar/000\.jpg: .*more than data\.max_bytes"):
        read(path, max_bytes=size - 1).load(item)
    with pytest.raises(DataError, match=r"s\.tar/000\.jpg: 24 x 16 pixels, more than data\.max_pixels"):
        read(path, max_pixels=24 * 16 - 1).load(item)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", *FILES)
    dataset = read(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:1536])
    with pytest.raises(DataError, match=r"s\.tar: truncated, damaged"):
        read(path)
    with pytest.raises(DataError, match=r"s\.tar/002\.webp"):
        dataset.load(dataset.images[2])
    path.unlink()
    with pytest.raises(DataError, match=r"s\.tar: cannot be read"):
        dataset.load(dataset.images[0])
    with pytest.raises(DataError, match=r"no image with a caption; a sample is KEY\.jpg"):
        read(shard(tmp_path / "empty.tar", ("README", b"")))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(len(FILES))))
def test_the_order_within_a_shard_changes_no_sample(tmp_path: Path, order: list[int]) -> None:
    dataset = read(shard(tmp_path / "s.tar", *(FILES[place] for place in order)))
    assert texts(dataset) == WANTED
    digests = {item.id: item.sha256 for item in dataset.images}
    assert digests == {name: hashlib.sha256(jpeg(n)).hexdigest() for n, name in enumerate(WANTED)}
