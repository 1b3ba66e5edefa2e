"""Pins of an aligned model as it is, over a folder of pictures.

- The embeddings of zero-shot are transformers' own vectors of pictures and captions, and its rsum is that of their
  cosines; it learns nothing and no number of it depends on the seed.
- CMFG over the same features ranks so before its first step, with and without the closed form for its nodes, and
  otherwise after some.
- `cmfg bench` gives it a row, plain and corrected, where a recipe has an aligned model, asked for or not; asked for
  without one it is an error of one line.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from aligned_models import SAVE, Reference, save_siglip
from commands import SMALL, cmfg
from PIL import Image

from cmfg_dgl.config import load_config
from cmfg_dgl.experiments.bench.cells import run_cell
from cmfg_dgl.experiments.bench.data import BenchData
from cmfg_dgl.experiments.bench.methods import make_method
from cmfg_dgl.files import read_json

WITHOUT_SIZE = [item for item in SMALL if not item.startswith("features.image_size")]


@pytest.fixture(scope="module", params=SAVE)
def data(request, pictures, cache, tmp_path_factory):
    folder = SAVE[request.param](tmp_path_factory.mktemp("models") / request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMFG_CACHE", str(cache))
        config = load_config("folder", [f"data.root={pictures}", f"features.aligned={folder}", *WITHOUT_SIZE])
        yield BenchData.prepare(config, None)


def cosines(data, part):
    """By transformers, image by image and caption by caption, (N, M)."""
    reference, dataset = Reference(Path(data.config.features.aligned)), data.experiment.dataset
    root = Path(data.config.data.root)
    images = [Image.open(root / dataset.images[i].id).convert("RGB") for i in part.split.images]
    return reference.images(images), reference.texts([dataset.captions[c].text for c in part.split.captions])


def assert_ranks_as(scores, expected):
    """Both orders agree, but for what differs by rounding."""
    for ours, theirs in ((scores, expected), (scores.T, expected.T)):
        falling = theirs.gather(1, ours.argsort(1, descending=True))
        assert (falling.diff(dim=1) < 1e-5).all()


def rsum(scores, owner):
    """Of cosines (N, M), each query's best right answer against all wrong ones that score as much."""
    total = 0.0
    right = owner == np.arange(len(scores))[:, None]
    for table, positive in ((scores, right), (scores.T, right.T)):
        best = np.where(positive, table, -np.inf).max(1, keepdims=True)
        rank = 1 + ((table >= best) & ~positive).sum(1)
        total += sum(100 * float(np.mean(rank <= k)) for k in (1, 5, 10))
    return total


def test_zero_shot_is_the_cosine_of_transformers(data):
    images, captions = cosines(data, data.test)
    method = make_method("zero-shot", data.config, data.widths, 0, {})
    ours = method.embeddings(data.test.pair_dataset)
    torch.testing.assert_close(ours, (images, captions), rtol=0, atol=1e-5)
    assert_ranks_as(ours[0] @ ours[1].T, images @ captions.T)
    assert method.size == 0
    cells = [run_cell(data, "zero-shot", seed, {}, minutes=1, audited=False)["corrections"] for seed in (0, 1)]
    assert cells[0] == cells[1]
    plain = cells[0]["none"]["stages"]
    expected = rsum((ours[0] @ ours[1].T).double().numpy(), data.test.split.caption_image)
    assert plain["first_stage"]["rsum"] == pytest.approx(expected)
    assert set(plain) == {"first_stage"}
    assert cells[0]["hubness"]["stages"]["first_stage"]["per_query"] != plain["first_stage"]["per_query"]


@pytest.mark.parametrize("init", ["cca", "random"])
def test_cmfg_begins_as_zero_shot(data, init):
    images, captions = cosines(data, data.test)
    method = make_method("cmfg", data.config, data.widths, 0, {"model.init": init})
    method.model.init_from_cca(data.training.pair_dataset)
    mine = method.embeddings(data.test.pair_dataset)
    scale = method.model.scale("first").item()
    torch.testing.assert_close(mine[0] / scale**0.5, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(mine[1] / scale**0.5, captions, rtol=0, atol=1e-5)
    assert_ranks_as(mine[0] @ mine[1].T / scale, images @ captions.T)
    assert scale == pytest.approx(99, rel=1e-3)
    method.fit(data.training, lambda: 0.0)
    trained = method.embeddings(data.test.pair_dataset)
    assert (trained[0] - mine[0]).abs().max() > 1e-3 * scale**0.5


@pytest.mark.usefixtures("elsewhere")
def test_a_bench_over_an_aligned_model_has_its_row(pictures, tmp_path):
    overrides = [f"data.root={pictures}", f"features.aligned={save_siglip(tmp_path / 'model')}", *WITHOUT_SIZE]
    given = ("recipes=[folder]", f"overrides={json.dumps(overrides)}", "methods=[cca]", "seeds=[0]")
    result = cmfg("bench", "-c", "smoke", *given, "-o", tmp_path / "bench", "-q")
    assert result.code == 0, result.err
    results = read_json(tmp_path / "bench" / "results.json")
    rows = {(row["method"], row["correction"]) for row in results["rows"]}
    assert rows == {(method, column) for method in ("cca", "zero-shot") for column in ("none", "hubness")}
    assert results["audits"]["zero-shot"]["passed"]


@pytest.mark.usefixtures("elsewhere")
def test_asked_for_without_an_aligned_model_it_is_told(pictures, tmp_path):
    given = ("recipes=[folder]", f"overrides={json.dumps([f'data.root={pictures}', *SMALL])}")
    result = cmfg("bench", "-c", "smoke", *given, "methods=[cca, zero-shot]", "-o", tmp_path / "bench", "-q")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert (
        "zero-shot is an aligned model as it is, and the recipe folder has none; set features.aligned" in result.err
    )
    assert not (tmp_path / "bench").exists()
