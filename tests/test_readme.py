"""The README's Python lines run as they stand there, on a folder of pictures and a picture beside it."""

from __future__ import annotations

import csv
import random
import re
from pathlib import Path

import pytest
from commands import draw_shape

CHECKOUT = Path(__file__).resolve().parents[1]
WORDS = (
    ("red", "green", "blue", "yellow", "black", "white"),
    ("circle", "square", "triangle"),
    ("harbour", "kitchen", "market", "garden", "station", "museum", "valley", "attic"),
    ("morning", "evening", "winter", "summer", "storm", "holiday", "parade", "silence"),
)


def draw_pictures(folder: Path, count: int) -> None:
    """Pictures of shapes with captions of words that few share."""
    folder.mkdir()
    generator = random.Random(0)
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number in range(count):
            colour, shape, place, time = (generator.choice(words) for words in WORDS)
            draw_shape(folder / f"{number}.png", colour, shape, generator.choice(["left", "right"]))
            writer.writerow([f"{number}.png", f"{colour} {shape} {place} {time} number{number}"])


@pytest.mark.usefixtures("elsewhere")
def test_the_lines_of_python_run_as_they_stand(tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (CHECKOUT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    draw_pictures(tmp_path / "pictures", 60)
    draw_shape(tmp_path / "new.png", "red", "circle", "left")
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert 0 <= float(printed[0]) <= 600
    assert len(printed) == 3
    assert all(re.fullmatch(r"-?\d+\.\d\d an? .+", line) for line in printed[1:])
    assert {"inspect.html", "attention.json"} <= {path.name for path in (tmp_path / "attention").iterdir()}
    assert (tmp_path / "model" / "matcher.json").is_file()
