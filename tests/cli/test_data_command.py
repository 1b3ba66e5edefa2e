"""`cmfg data`.

- `ls` lists what `data.name` takes; `info` counts what is there, with one protocol id a split.
- `check` is exit 0 on sound data and exit 3 with a finding for each thing that is wrong, each named.
- What cannot be read at all is exit 3 in one line with the remedy.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from commands import cmfg, draw_folder, write_captions

OPTIONS = ("-c", "folder", "data.near_duplicate=1.0")


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shapes, of which one is no image, one has an empty caption more and one no caption at all."""
    root = tmp_path_factory.mktemp("data") / "spoilt"
    rows = draw_folder(root, ("red", "blue"))
    (root / "red-circle-left.png").write_text("no image")
    rows.append(("red-circle-right.png", " "))
    write_captions(root, [(name, text) for name, text in rows if name != "blue-square-left.png"])
    return root


def test_ls_lists_the_data_sets() -> None:
    result = cmfg("data", "ls", "--json")
    assert (result.code, result.err) == (0, "")
    published = {"mirflickr25k", "flickr8k", "flickr30k", "coco", "theojiang300k"}
    formats = {"folder", "blip", "clip_benchmark", "webdataset", "huggingface", "precomputed"}
    assert set(result.json) == published | formats | {"openmoji", "tuxpaint", "scenes"}
    assert all(name in cmfg("data", "ls").out for name in result.json)
    for name in result.json:
        recipe = ("-c", name) if name == "precomputed" else ()
        assert cmfg("config", "validate", *recipe, f"data.name={name}").code == 0


def test_info_counts(pictures: Path) -> None:
    result = cmfg("data", "info", *OPTIONS, f"data.root={pictures}", "--json")
    assert (result.code, result.err) == (0, "")
    told = result.json
    assert (told["dataset"], told["images"], told["captions"]) == ("shapes", 60, 120)
    assert told["near_duplicates"] == 0
    assert told["bad"] == {}
    assert set(told["splits"]) == {"train", "val", "test"}
    assert sum(split["images"] for split in told["splits"].values()) == 60
    assert sum(split["captions"] for split in told["splits"].values()) == 120
    assert len({split["protocol"] for split in told["splits"].values()}) == 3
    table = cmfg("data", "info", *OPTIONS, f"data.root={pictures}")
    assert all(split["protocol"] in table.out for split in told["splits"].values())


def test_info_of_a_split_that_is_empty(spoilt: Path) -> None:
    options = (*OPTIONS, f"data.root={spoilt}", "data.fractions={train: 0.998, val: 0.001, test: 0.001}")
    told = cmfg("data", "info", *options, "--json").json
    assert told["splits"]["train"]["images"] == told["images"] == 11
    assert told["splits"]["test"] == {"images": 0, "captions": 0, "protocol": None}
    assert cmfg("data", "info", *options).code == 0


def test_info_names_what_is_left_out(spoilt: Path) -> None:
    told = cmfg("data", "info", *OPTIONS, f"data.root={spoilt}", "--json").json
    assert set(told["bad"]) == {"red-circle-right.png#2", "blue-square-left.png"}
    assert all(item in reason for item, reason in told["bad"].items())
    table = cmfg("data", "info", *OPTIONS, f"data.root={spoilt}")
    assert table.code == 0
    assert all(f"left out: {reason}" in table.out for reason in told["bad"].values())


def test_check_of_sound_data(pictures: Path) -> None:
    result = cmfg("data", "check", *OPTIONS, f"data.root={pictures}", "--json")
    assert result.code == 0
    assert (result.json["dataset"], result.json["errors"]) == ("shapes", 0)
    assert {finding["severity"] for finding in result.json["findings"]} == {"info"}
    assert result.err == "images: 60/60\n"
    assert cmfg("data", "check", *OPTIONS, f"data.root={pictures}", "-q").err == ""


def test_check_finds_what_is_wrong(spoilt: Path) -> None:
    result = cmfg("data", "check", *OPTIONS, f"data.root={spoilt}", "--json")
    assert result.code == 3
    findings = result.json["findings"]
    assert all(set(finding) == {"severity", "code", "item", "message"} for finding in findings)
    errors = {(finding["code"], finding["item"]) for finding in findings if finding["severity"] == "error"}
    assert errors == {("bad-image", "red-circle-left.png"), ("bad-item", "red-circle-right.png#2")}
    unlisted = ("warning", "bad-item", "blue-square-left.png")
    assert unlisted in [(finding["severity"], finding["code"], finding["item"]) for finding in findings]
    assert result.json["errors"] == 2
    table = cmfg("data", "check", *OPTIONS, f"data.root={spoilt}")
    assert table.code == 3
    assert "2 errors" in table.out
    assert all(item in table.out for _, item in errors)


def test_check_finds_a_picture_and_a_caption_in_two_splits(pictures: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(pictures, tmp_path / "leaky"))
    shutil.copy(root / "red-circle-left.png", root / "twin.png")
    lines = ["image,caption,split", "red-circle-left.png,one thing,train", "twin.png,another thing,test"]
    lines += ["blue-circle-left.png,the same,train", "pink-circle-left.png,The  same!,test"]
    (root / "captions.csv").write_text("\n".join(lines))
    result = cmfg("data", "check", *OPTIONS, f"data.root={root}", "--json")
    assert result.code == 3
    counts = Counter(finding["code"] for finding in result.json["findings"])
    twins = {finding["item"] for finding in result.json["findings"] if "the same picture as" in finding["message"]}
    assert twins == {"red-circle-left.png", "twin.png"}
    assert counts["same-caption"] == 1


def test_what_is_bad_is_written_and_left_out(spoilt: Path, tmp_path: Path) -> None:
    options, file = (*OPTIONS, f"data.root={spoilt}", "--json"), tmp_path / "bad.txt"
    whole = cmfg("data", "info", *options).json
    assert cmfg("data", "check", *options, "--write-exclude", file).code == 3
    lines = file.read_text().splitlines()
    assert set(lines[2::2]) == {"red-circle-right.png#2", "red-circle-left.png"}
    assert all(line.startswith("# ") for line in lines[::2][:1] + lines[1::2])
    left = cmfg("data", "info", *options, f"data.exclude={file}")
    assert (left.code, left.json["images"], left.json["captions"]) == (
        0,
        whole["images"] - 1,
        whole["captions"] - 2,
    )
    assert set(left.json["bad"]) == {"blue-square-left.png"}
    assert any("left out by data.exclude" in note for note in left.json["notes"]) and "left out by" in left.err
    again = cmfg("data", "check", *options, f"data.exclude={file}", "--write-exclude", file)
    assert (again.code, again.json["errors"]) == (0, 0)
    assert set(file.read_text().splitlines()[2::2]) >= {"red-circle-right.png#2", "red-circle-left.png#0"}
    other = tmp_path / "mine.txt"
    other.write_text("mine")
    refused = cmfg("data", "check", *options, "--write-exclude", other)
    assert (refused.code, other.read_text()) == (2, "mine")


TEMPLATES = {
    "unknown-tokens": lambda i: f"{i} 🦖 🎈",
    "equal-tokens": lambda i: f"{i // 4} {'🦖' if i % 2 else '🎈'}",
    "cut-caption": lambda i: "a long story of many words " * 20 + f"number {i}",
}


@pytest.mark.parametrize("code", TEMPLATES)
def test_what_the_text_encoder_does_not_read_is_told(pictures: Path, tmp_path: Path, code: str) -> None:
    root = Path(shutil.copytree(pictures, tmp_path / "unread"))
    names = sorted(path.name for path in root.glob("*.png"))[:24]
    for path in root.glob("*.png"):
        if path.name not in names:
            path.unlink()
    rows = [f"{name},{TEMPLATES[code](i)},{('train', 'val', 'test')[i % 3]}" for i, name in enumerate(names)]
    (root / "captions.csv").write_text("\n".join(["image,caption,split", *rows]))
    findings = cmfg("data", "check", *OPTIONS, f"data.root={root}", "--json").json["findings"]
    found = {finding["code"]: finding["message"] for finding in findings if finding["severity"] == "warning"}
    assert ("features.max_tokens" if code == "cut-caption" else "features.text") in found[code]
    trained = cmfg("train", *OPTIONS, f"data.root={root}", "-o", "run")
    assert trained.code == 0
    assert "train+val: " in trained.err
    unknown = ("unknown to minilm", "features.text")
    told = ("longer than features.max_tokens=64",) if code == "cut-caption" else unknown
    assert all(text in trained.err for text in told)
    tested = cmfg("eval", "run")
    assert tested.code == 0
    assert all(text in tested.err for text in ("test: ", *told))


def test_captions_of_one_template_are_told_before_extraction(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(pictures, tmp_path / "alike"))
    names = sorted(path.name for path in root.glob("*.png"))
    rows = [f"{name},a small picture of the thing that has the number {i}" for i, name in enumerate(names)]
    (root / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    monkeypatch.setenv("CMFG_CACHE", str(tmp_path / "cache"))
    refused = cmfg("train", *OPTIONS, f"data.root={root}", "data.near_duplicate=0.75", "-o", "run")
    assert refused.code == 3
    assert "60 of 60 images are one group of near-duplicate captions" in refused.err
    assert "data.near_duplicate=1.0" in refused.err
    assert not list((tmp_path / "cache").glob("images-*"))
    assert cmfg("train", *OPTIONS, f"data.root={root}", "-o", "run").code == 0


@pytest.mark.parametrize("command", [("data", "info"), ("data", "check"), ("features", "build"), ("train",)])
def test_data_that_are_not_there_are_exit_3(command: tuple[str, ...], tmp_path: Path) -> None:
    for override, message in (
        ("data.name=folder", "data.root is not set"),
        (f"data.root={tmp_path / 'gone'}", "there is no such folder"),
        (f"data.root={tmp_path}", "no captions; write captions.csv"),
    ):
        result = cmfg(*command, "-c", "folder", override, *(("--dry-run",) if command == ("train",) else ()))
        assert (result.code, result.out) == (3, "")
        assert message in result.err
        assert len(result.err.splitlines()) == 1


def test_a_data_set_that_there_is_not(tmp_path: Path) -> None:
    result = cmfg("data", "info", "data.name=foldre")
    assert (result.code, result.out) == (2, "")
    assert "did you mean 'folder'" in result.err
