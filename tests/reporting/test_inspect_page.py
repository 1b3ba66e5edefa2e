"""`inspect.html`.

Invariants:
- it asks nothing of the network and runs its own script only, whatever names and captions hold;
- its weights are those of the model to a 65,535th of the largest; of a large graph each node keeps its strongest
  sources, and the page stays below 3 MB and still draws 1,024 patches and 64 tokens;
- in a browser: what is chosen by the address, by keys, by a click or by pointing gets the glow that the weights
  give it, for a head and for their mean, with pieces of words joined (mean as they hear, sum as they are heard) or
  not; keys stop at the edges; on a narrow page nothing sticks out;
- what the model does not see of picture and caption is told;
- the table has each relation with its numbers; faithfulness stands there where it was measured, and only there.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import SCHEMAS
from inspections import SPANS, TEXT, WORDS, inspected, make_model, make_pair

from cmfg_dgl.explain.inspect import Inspection, inspect_pair
from cmfg_dgl.reporting import inspect_page
from cmfg_dgl.reporting.inspect_page import write_inspection

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
EVIL = "</script><script>alert(1)</script> & \"quotes' <img src=https://evil.example/x> {{ 7 * 7 }}"
UNITS = ((0,), (1, 2, 3), (4,), (5,))
"""The tokens of each word of the caption."""


def page(inspection: Inspection, folder: Path) -> str:
    return write_inspection(inspection, folder).read_text(encoding="utf-8")


def data_of(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def unpacked(text: str) -> Any:
    return np.frombuffer(base64.b64decode(text), "<u2").astype(np.int64)


def dom(path: Path, fragment: str = "", *, size: str = "1200,900") -> str:
    """The page's tree after its script, as Chromium has it."""
    command = [
        *(
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--window-size={size}",
            "--virtual-time-budget=2000",
        ),
        *(f"--user-data-dir={path.parent / 'browser'}", "--dump-dom", f"{path.as_uri()}{fragment}"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert 'data-ready="true"' in result.stdout, result.stderr
    return result.stdout


def after(path: Path, steps: str, *, size: str = "1200,900") -> list[Any]:
    """What `steps` (JavaScript) hands to `log` on the page, whose policy is lifted for that."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text(encoding="utf-8"))
    tail = f"""<pre id="log"></pre><script>
const logged = [];
const log = (value) => logged.push(value);
const state = () => log([document.body.dataset.chosen, document.body.dataset.best]);
const key = (id, name) => byId(id).dispatchEvent(new KeyboardEvent("keydown", {{ key: name, bubbles: true }}));
const opacities = () => cells.map((cell) => Number(cell.style.fillOpacity));
{steps}
byId("log").textContent = JSON.stringify(logged);
</script></body>"""
    changed = path.with_name("changed.html")
    changed.write_text(text.replace("</body>", tail), encoding="utf-8")
    found = re.search(r'<pre id="log">(.*?)</pre>', dom(changed, size=size), re.S)
    assert found
    logged: list[Any] = json.loads(html.unescape(found[1]))
    return logged


def table(inspection: Inspection, relation: str, head: int | None) -> Any:
    """Weights (targets, sources) of a relation in the last layer, float64."""
    part = [part for part in inspection.relations if part.relation == relation][-1]
    weights = inspection.used(part).double()
    values = weights.mean(1) if head is None else weights[:, head]
    dense = np.zeros((len(part.lse), int(part.source.max()) + 1))
    dense[part.target.numpy(), part.source.numpy()] = values.numpy()
    return dense


def joined(dense: Any, target: bool, source: bool) -> Any:
    """The table with pieces of words joined on the sides that are tokens."""
    if target:
        dense = np.stack([dense[list(unit)].mean(0) for unit in UNITS])
    return np.stack([dense[:, list(unit)].sum(1) for unit in UNITS], 1) if source else dense


def test_it_asks_nothing_of_the_network_and_runs_its_own_script(tmp_path: Path) -> None:
    pair = make_pair(text=EVIL, name=EVIL, spans=[(n, n + 3) for n in range(6)])
    text = page(inspect_pair(make_model(), pair), tmp_path)
    assert EVIL not in text
    assert html.escape(EVIL, quote=False).replace('"', "&#34;").replace("'", "&#39;") in text
    shown = text.replace(html.escape(EVIL), "").replace("https://evil.example", "")
    assert "http" not in re.sub(r"http-equiv", "", shown)
    assert not re.search(
        r"\b(src|href)\s*=|@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|\beval\(", shown.replace("img src=", "")
    )
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert data_of(text)["text"] == EVIL


@pytest.mark.parametrize("softmax", ["relation", "joint"])
def test_weights_are_those_of_the_model(softmax: str, tmp_path: Path) -> None:
    found = inspected(softmax=softmax)
    for part, packed in zip(found.relations, data_of(page(found, tmp_path))["relations"], strict=True):
        assert (packed["name"], packed["layer"], packed["edges"]) == (part.relation, part.layer, len(part.source))
        assert unpacked(packed["sources"]).tolist() == part.source.tolist()
        assert unpacked(packed["targets"]).tolist() == part.target.tolist()
        weights, largest = unpacked(packed["weights"]).reshape(2, -1), np.array(packed["largest"])
        expected = found.used(part).T.numpy()
        assert np.abs(weights / 65535 * largest[:, None] - expected).max() <= 0.51 * largest.max() / 65535


def test_of_a_large_graph_each_node_keeps_its_strongest_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = inspected(layers=1)
    # Two relations enter each of 12 patches and 6 tokens, with two heads.
    monkeypatch.setattr(inspect_page, "WEIGHTS", 3 * 2 * 2 * (12 + 6))
    text = page(found, tmp_path)
    assert "the 3 strongest sources" in text
    for part, packed in zip(found.relations, data_of(text)["relations"], strict=True):
        kept: dict[int, set[int]] = {}
        for source, target in zip(unpacked(packed["sources"]), unpacked(packed["targets"]), strict=True):
            kept.setdefault(int(target), set()).add(int(source))
        dense = table(found, part.relation, None)
        expected = {u: set(np.argsort(-row, kind="stable")[:3].tolist()) for u, row in enumerate(dense)}
        assert kept == expected


def test_the_table_has_each_relation(tmp_path: Path) -> None:
    found = inspected()
    text = html.unescape(page(found, tmp_path))
    for name, summary in found.summaries.items():
        row = re.search(rf'<tr><th scope="row">{name}</th>(.*?)</tr>', text)
        assert row
        cells = re.findall(r"<td[^>]*>(?:<span[^>]*>)?([^<]*)", row[1])
        assert f"{100 * summary.mass:.1f} %" in cells
        assert f"{summary.entropy:.2f}" in cells
        assert f"{summary.delta_when_removed:+.4f}" in cells
        assert f"{found.score + summary.delta_when_removed:.4f}" in cells


def test_what_the_model_does_not_see_is_told(tmp_path: Path) -> None:
    cut, margin = "The caption is longer than the model reads: its first 5 tokens", "The darkened margin is cut off"
    whole = make_pair(view=(0.0, 0.0, 100.0, 60.0))
    for pair, told in (
        (whole, ()),
        (make_pair(), (margin,)),
        (make_pair(spans=SPANS[:5], words=WORDS[:5]), (margin, cut)),
    ):
        text = page(inspect_pair(make_model(), pair), tmp_path)
        assert [words in text for words in (margin, cut)] == [words in told for words in (margin, cut)]


def test_faithfulness_stands_where_it_was_measured(tmp_path: Path) -> None:
    heading = "Does the score follow the attention?"
    assert heading not in page(inspected(), tmp_path)
    found = inspect_pair(make_model(), make_pair(), untrained=make_model())
    assert found.faithfulness is not None
    text = page(found, tmp_path)
    assert heading in text
    record = found.faithfulness.record()
    for way in ("deletion", "insertion"):
        for name in ("attention", "gradient", "random"):
            assert f"{record[way][name]['area']:.4f}" in text
    assert "<b>+1.00</b>" in text
    assert text.count("<svg") == 2


@needs_browser
def test_the_address_chooses(tmp_path: Path) -> None:
    found = inspected(layers=1)
    path = write_inspection(found, tmp_path)
    grounds = joined(table(found, "grounds", 1), True, False)
    text = dom(path, "#relation=grounds.0&head=1&token=1")
    assert 'data-chosen="token 1"' in text
    assert f'data-best="patch {grounds[1].argmax()}"' in text
    assert "unforgettable" in re.search(r'class="unit chosen"[^>]*>([^<]*)', text)[1]  # type: ignore[index]
    assert "“unforgettable” attends to these (grounds, layer 0, head 1)" in text


@needs_browser
def test_what_is_chosen_glows_as_its_weights_are(tmp_path: Path) -> None:
    found = inspected(layers=1)
    steps = """
log(opacities());
key("caption", "ArrowRight"); key("caption", "ArrowRight"); state(); log(opacities());
key("caption", "End"); key("caption", "ArrowRight"); state();
key("picture", "ArrowDown"); key("picture", "ArrowUp"); state();
key("picture", "ArrowRight"); key("picture", "ArrowDown"); state();
log(units.map((unit) => Number(unit.element.dataset.value)));
key("picture", "Escape"); state();
cells[7].dispatchEvent(new MouseEvent("click", { bubbles: true })); state();
byId("relation").value = "3"; byId("relation").dispatchEvent(new Event("change")); state();
log(data.relations.map((relation) => relation.name));
byId("head").value = "1"; byId("head").dispatchEvent(new Event("change")); state();
byId("relation").value = "1"; byId("relation").dispatchEvent(new Event("change")); state();
const move = new PointerEvent("pointermove", { bubbles: true, pointerType: "mouse" });
units[2].element.dispatchEvent(move); render(); state();
byId("caption").dispatchEvent(new PointerEvent("pointerleave")); render(); state();
byId("joined").click(); key("caption", "Home"); key("caption", "ArrowRight"); log(units.length); state();
log(location.hash);
"""
    path = write_inspection(found, tmp_path)
    names = [part.relation for part in found.relations]
    relations = {name: str(number) for number, name in enumerate(names)}
    steps = steps.replace('"3"', f'"{relations["describes"]}"').replace(
        '"1"; byId("relation")', f'"{relations["context"]}"; byId("relation")'
    )
    logged = iter(after(path, steps))

    grounds = joined(table(found, "grounds", None), True, False)
    describes, context = table(found, "describes", None), table(found, "context", 1)

    def glow(values: Any) -> Any:
        return pytest.approx(0.85 * (values - values.min()) / values.max(), abs=1e-4)

    assert next(logged) == glow(table(found, "grounds", None).mean(0))
    assert next(logged) == ["token 1", f"patch {grounds[1].argmax()}"]
    assert next(logged) == glow(grounds[1])
    assert next(logged) == ["token 3", f"patch {grounds[3].argmax()}"]
    assert next(logged) == ["patch 0", f"token {grounds[:, 0].argmax()}"]
    assert next(logged) == ["patch 5", f"token {grounds[:, 5].argmax()}"]
    assert next(logged) == pytest.approx(grounds[:, 5], rel=0.05)
    assert next(logged)[0] == ""
    assert next(logged) == ["patch 7", f"token {grounds[:, 7].argmax()}"]
    assert next(logged) == ["patch 7", f"token {joined(describes, False, True)[7].argmax()}"]
    assert next(logged) == names
    one_head = joined(table(found, "describes", 1), False, True)
    assert next(logged) == ["patch 7", f"token {one_head[7].argmax()}"]
    assert next(logged) == ["patch 7", ""]  # patches have no part in context
    within = joined(context, True, True)
    assert next(logged) == ["token 2", f"token {within[2].argmax()}"]
    assert next(logged) == ["patch 7", ""]
    assert next(logged) == 6
    assert next(logged) == ["token 1", f"token {context[1].argmax()}"]
    assert next(logged) == "#relation=context.0&head=1&pieces&token=1"


@needs_browser
def test_spans_are_found_behind_a_character_that_counts_twice(tmp_path: Path) -> None:
    path = write_inspection(inspected(), tmp_path)
    assert after(path, "log(units.map((unit) => unit.element.textContent)); log(byId('caption').textContent)") == [
        ["an", "unforgettable", "\U0001f642", "ball"],
        TEXT,
    ]


def large() -> Inspection:
    text = " ".join(f"word{n}" for n in range(64))
    ends = np.cumsum([len(word) + 1 for word in text.split()])
    spans: Sequence[tuple[int, int]] = [
        (int(e) - len(w) - 1, int(e) - 1) for w, e in zip(text.split(), ends, strict=True)
    ]
    pair = make_pair((32, 32), text=text, spans=spans, words=range(64), view=(0.0, 0.0, 100.0, 60.0))
    return inspect_pair(make_model(SCHEMAS["complete"], heads=4, layers=1), pair)


@needs_browser
def test_a_large_pair_is_drawn_from_a_small_page(tmp_path: Path) -> None:
    path = write_inspection(large(), tmp_path)
    assert path.stat().st_size < 3_000_000
    text = dom(path, "#relation=grounds.0&token=63")
    assert len(re.findall(r"<rect [^>]*data-number=", text)) == 1024
    assert len(re.findall(r'class="unit', text)) == 64
    assert 'data-chosen="token 63"' in text


@needs_browser
def test_nothing_sticks_out_of_a_narrow_page(tmp_path: Path) -> None:
    steps = """
document.documentElement.style.width = "360px";
const all = [...document.querySelectorAll("body *")].filter((element) => !element.closest(".scroll"));
const out = all.filter((element) => element.getBoundingClientRect().right > 361);
log(out.map((element) => element.outerHTML.slice(0, 80)));
log(matchMedia("(max-width: 46rem)").matches);
"""
    assert after(write_inspection(inspected(), tmp_path), steps, size="500,900") == [[], True]
