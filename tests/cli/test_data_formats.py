"""Data sets in the formats of others through the commands, on small files in their layouts.

- `cmfg data get` unpacks the stamps of Tux Paint to where `data.root` then finds them, or says in one line why not.
- `cmfg data info` says the same counts whatever the format; `data.language` chooses captions and protocol id.
- A run on tar shards trains and is evaluated without a file extracted, and finds damage that came later.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import SMALL, cmfg, draw_folder
from layouts import jpeg, picture, stamp, tar_bytes

SPLITS = ("train", "val", "test")
WORDS = {n: f"thing{n} number{n}" for n in range(12)}


def ar(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


@pytest.fixture
def deb(tmp_path: Path) -> Path:
    """A package with twelve stamps."""
    files = []
    for number, words in WORDS.items():
        name = f"./usr/share/tuxpaint/stamps/things/{number}"
        text = f"A {words}.\n" + (f"fr.utf8=Une {words} chose.\n" if number % 2 else "")
        files += [(f"{name}.png", jpeg(number)), (f"{name}.txt", text.encode())]
    path = tmp_path / "stamps.deb"
    path.write_bytes(b"!<arch>\n" + ar("debian-binary", b"2.0\n") + ar("data.tar.xz", tar_bytes(files, "w:xz")))
    return path


def test_get_makes_what_info_reads(deb: Path, tmp_path: Path) -> None:
    got = cmfg("data", "get", "tuxpaint", "--to", tmp_path / "stamps", "--deb", deb, "--json")
    assert (got.code, got.err) == (0, "")
    assert got.json == {"dataset": "tuxpaint", "root": str(tmp_path / "stamps"), "files": 24}
    options = ("data", "info", "-c", "tuxpaint", f"data.root={tmp_path / 'stamps'}", "--json")
    english, french = cmfg(*options).json, cmfg(*options, "data.language=fr").json
    assert (english["images"], french["images"], english["bad"]) == (12, 6, {})
    assert french["notes"] == ["6 stamps have no caption in 'fr' and are left out"]
    ids = [
        {split["protocol"] for split in told["splits"].values() if split["protocol"]} for told in (english, french)
    ]
    assert not ids[0] & ids[1]
    refused = cmfg(*options, "data.language=frr")
    assert refused.code == 2 and "did you mean 'fr'" in refused.err
    again = cmfg("data", "get", "tuxpaint", "--to", tmp_path / "stamps", "--deb", deb)
    assert (again.code, again.out) == (3, "") and "there already" in again.err and len(again.err.splitlines()) == 1
    plain = cmfg("data", "get", "tuxpaint", "--to", tmp_path / "more", "--deb", deb)
    assert f"cmfg train -c tuxpaint data.root={tmp_path / 'more'}" in plain.out


def test_get_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = cmfg("data", "get", "tuxpaint", "--to", tmp_path / "stamps")
    assert (result.code, result.out) == (3, "") and "apt-get is not on this machine" in result.err
    assert not (tmp_path / "stamps").exists()
    assert cmfg("data", "get", "openmoji", "--to", tmp_path / "x").code == 2
    how = cmfg("data", "get", "tuxpaint")
    assert (how.code, how.err) == (0, "") and "--to DIR` and set data.root=DIR" in how.out
    assert cmfg("data", "get", "tuxpaint", "--json").json["root"] is None


def write(root: Path, kind: str) -> None:
    """The same twelve pairs in each format, eight of them for training and two for each other split."""
    for number, words in WORDS.items():
        split = SPLITS[max(0, number - 8) // 2 + (number >= 8)] if number < 10 else "test"
        picture(root / f"{number}.jpg", number)
        match kind:
            case "blip":
                path = root / f"flickr30k_{split}.json"
                records = json.loads(path.read_text()) if path.exists() else []
                path.write_text(json.dumps([*records, {"image": f"{number}.jpg", "caption": words}]))
            case "clip_benchmark":
                path = root / f"flickr30k_{split}_karpathy.txt"
                before = path.read_text() if path.exists() else "image,caption\n"
                path.write_text(f"{before}{number}.jpg,{words}\n")
            case "webdataset":
                (root / split).mkdir(exist_ok=True)
                files = [(f"{number}.jpg", jpeg(number)), (f"{number}.txt", words.encode())]
                (root / split / f"{number}.tar").write_bytes(tar_bytes(files))


@pytest.mark.parametrize("kind", ["blip", "clip_benchmark", "webdataset"])
def test_info_and_check_of_each_format(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "mine"
    write(root, kind)
    told = cmfg("data", "info", "-c", kind, f"data.root={root}", "--json")
    assert (told.code, told.err) == (0, "")
    assert {name: split["images"] for name, split in told.json["splits"].items()} == {
        "train": 8,
        "val": 2,
        "test": 2,
    }
    assert all(split["protocol"].startswith(f"mine/given/{name}/") for name, split in told.json["splits"].items())
    check = cmfg("data", "check", "-c", kind, f"data.root={root}", "--json")
    assert (check.code, check.json["errors"]) == (0, 0)
    missing = cmfg("data", "info", "-c", kind, f"data.root={tmp_path / 'gone'}")
    assert missing.code == 3 and len(missing.err.splitlines()) == 1
    assert "data.root is not set" in cmfg("data", "info", "-c", kind).err


def test_a_run_on_tar_shards(tmp_path: Path) -> None:
    rows = draw_folder(tmp_path / "shapes")
    texts: dict[str, list[str]] = {}
    for name, text in rows:
        texts.setdefault(name, []).append(text)
    files = []
    for name, captions in texts.items():
        key = name.removesuffix(".png")
        files += [(name, (tmp_path / "shapes" / name).read_bytes()), (f"{key}.txt", "\n".join(captions).encode())]
    root = tmp_path / "shards"
    root.mkdir()
    for number in range(2):
        (root / f"{number}.tar").write_bytes(tar_bytes(files[number * 60 : number * 60 + 60]))
    run = tmp_path / "run"
    trained = cmfg("train", "-c", "webdataset", f"data.root={root}", *SMALL, "-o", run, "-q")
    assert trained.code == 0, trained.err
    result = cmfg("eval", run, "--json")
    assert result.code == 0, result.err
    assert result.json["protocol"].startswith("shards/hash-50-20-30,seed-0,near-1/test/")
    assert sorted(path.name for path in root.iterdir()) == ["0.tar", "1.tar"]
    (root / "1.tar").write_bytes((root / "1.tar").read_bytes()[:20_000])
    damaged = cmfg("eval", run, "--force")
    assert damaged.code == 3 and "1.tar: truncated, damaged" in damaged.err


@pytest.mark.parametrize(("language", "words"), [("en", "A thing"), ("fr", "Une chose")])
def test_a_run_on_stamps_in_two_languages(tmp_path: Path, language: str, words: str) -> None:
    for number in range(40):
        captions = {"en": f"A thing{number}.", "fr": f"Une chose{number} numéro{number}."}
        stamp(tmp_path / "stamps", f"things/{number}", captions, number, ".svg" if number % 3 else ".png")
    options = ("-c", "tuxpaint", f"data.root={tmp_path / 'stamps'}", f"data.language={language}", *SMALL)
    trained = cmfg("train", *options, "-o", tmp_path / "run", "-q")
    assert trained.code == 0, trained.err
    manifest = json.loads((tmp_path / "run" / "manifest-train.json").read_text())
    assert manifest["rule"] == f"language-{language},hash-50-20-30,seed-0,near-1"
    assert all(text.startswith(words) for item in manifest["items"] for text in item["captions"])
    assert cmfg("eval", tmp_path / "run", "--json").json["label"]["labels"] == 1
