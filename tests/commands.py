"""The `cmfg` command for tests: called in this process, on a small folder of drawn shapes."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from PIL import Image, ImageDraw

from cmfg_dgl.cli.main import main
from cmfg_dgl.files import sha256_file

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple", "pink", "brown")
SHAPES = ("circle", "square", "triangle")
SIDES = ("left", "right")

SMALL = (
    "data.near_duplicate=1.0",
    "data.fractions={train: 0.5, val: 0.2, test: 0.3}",
    "features.image_size=64",
    "model.width=32",
    "training.epochs=2",
    "training.batch_size=16",
    "retrieval.k=8",
)
"""Overrides with which a run takes a second or two."""


@dataclass(frozen=True)
class Result:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """All of stdout as one JSON value; NaN and Infinity are not JSON."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


@dataclass(frozen=True)
class Trained:
    """A finished run: where it lies, the arguments of `cmfg train` that made it, and what that printed."""

    folder: Path
    arguments: tuple[str, ...]
    result: Result


def train_once(folder: Path, cache: Path, *arguments: object) -> Path:
    """A finished run in `folder`, with the features of `cache`; for fixtures of a module."""
    with patch.dict(os.environ, CMFG_CACHE=str(cache)):
        result = cmfg("train", *arguments, "-o", folder)
    assert result.code == 0, result.err
    return folder


def cmfg(*arguments: object) -> Result:
    """Call `cmfg ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    code: Any = None
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", ["cmfg", *map(str, arguments)]):
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, before)
    return Result(0 if code is None else code, out.getvalue(), err.getvalue())


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start `cmfg ARGUMENTS` as a process of its own."""
    program = "from cmfg_dgl.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def draw_shape(path: Path, colour: str, shape: str, side: str) -> None:
    """Draw a shape to the left or to the right on grey, 64 x 64 pixels."""
    image = Image.new("RGB", (64, 64), (90, 90, 90))
    draw = ImageDraw.Draw(image)
    x = 4 if side == "left" else 36
    match shape:
        case "circle":
            draw.ellipse((x, 20, x + 24, 44), fill=colour)
        case "square":
            draw.rectangle((x, 20, x + 24, 44), fill=colour)
        case _:
            draw.polygon([(x, 44), (x + 24, 44), (x + 12, 20)], fill=colour)
    image.save(path)


def draw_folder(root: Path, colours: tuple[str, ...] = COLOURS) -> list[tuple[str, str]]:
    """Fill a folder with six shapes of each colour and captions.csv, two captions an image; returns its rows."""
    root.mkdir(parents=True)
    rows = []
    for colour, shape, side in product(colours, SHAPES, SIDES):
        name = f"{colour}-{shape}-{side}.png"
        draw_shape(root / name, colour, shape, side)
        rows += [(name, f"a {colour} {shape} on the {side}"), (name, f"{side} {shape} painted {colour}")]
    write_captions(root, rows)
    return rows


def write_captions(root: Path, rows: list[tuple[str, str]]) -> None:
    """Write captions.csv."""
    with (root / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])


def contents(*folders: Path) -> dict[str, str]:
    """Every path below some folders with the digest of its bytes, so that any change shows."""
    return {
        str(path): sha256_file(path) if path.is_file() else "folder"
        for folder in folders
        for path in sorted(folder.rglob("*"))
    }


def flip_byte(path: Path, position: int | None = None) -> None:
    """Change one byte of a file, that in the middle where no position is given."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 0xFF
    path.write_bytes(data)
