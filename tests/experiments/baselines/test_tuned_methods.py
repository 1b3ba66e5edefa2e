"""Pins of methods whose encoders are trained with them.

- Every method that learns by gradient changes the encoder, from its own copy of the pretrained weights; what it
  then embeds is by the encoder as it is, worked out by hand; validation sees each epoch's encoder.
- Every one of them changes adapters of both encoders, and embeds and scores pictures by them as they are.
- A method fitted with a learning rate of 0 for the encoder is the method of frozen features.
- Methods in closed form are refused in a line, also by a comparison before it begins; a cell depends on what is
  tuned, and all methods have the recipe's epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from berts import save_bert
from commands import cmfg
from PIL import Image
from planted import WIDTHS, planted
from torch.nn import functional as F
from vits import save_vit

from cmfg_dgl.config import Config, load_config
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.experiments.baselines.dual_encoder import DualEncoder
from cmfg_dgl.experiments.baselines.method import TrainingSet
from cmfg_dgl.experiments.baselines.vse_inf import VSEInf
from cmfg_dgl.experiments.bench.methods import METHODS, make_method, recipe_of
from cmfg_dgl.experiments.bench.settings import check_settings
from cmfg_dgl.features.encoders.load import load_vision_inputs
from cmfg_dgl.features.encoders.text import TextEncoder, load_text
from cmfg_dgl.features.encoders.tuned import load_tuned
from cmfg_dgl.features.nodes import EncoderInputs, Nodes
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset

WORDS = ("red", "green", "blue", "car", "dog", "tree", "big", "small")
GRADIENT = [name for name, kind in METHODS.items() if kind.tunes]
WIDTH = {"patch": WIDTHS["patch"], "token": 16}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = save_bert(tmp_path_factory.mktemp("bert"), words=WORDS, blocks=2)
    return load_text(str(folder), max_tokens=8, device="cpu")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


def config(encoder: TextEncoder, *overrides: str, tune: str = "all") -> Config:
    values = (
        *(f"features.text={encoder._folder}", "features.max_tokens=8", "training.epochs=2"),
        *("training.batch_size=16", "model.width=16", "model.heads=2", "model.layers=1"),
        *(f"training.tune.text={tune}", "training.tune.learning_rate=0.01", "training.tune.precision=fp32"),
    )
    return load_config(None, [*values, *overrides])


def sentences(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(WORDS), (count, 3), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row[: 1 + n % 3]) for n, row in enumerate(rows)]


def drawn(settings: Config, count: int) -> ItemSet:
    """Pictures of random pixels, as a tuned image encoder reads them."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    reader = load_vision_inputs(settings)
    assert reader is not None
    inputs = reader.encode([Image.fromarray(picture) for picture in pixels])
    assert isinstance(inputs, EncoderInputs)
    assert inputs.features is not None
    return ItemSet("image", count, inputs.select, pretrained=inputs.features.select)


def captions(encoder: TextEncoder, texts: Sequence[str]) -> ItemSet:
    stored = encoder.encode(list(texts)).nodes

    def inputs(items: torch.Tensor) -> Nodes:
        return encoder.inputs([encoder.prepare(texts[i]) for i in items.tolist()])

    return ItemSet("text", len(texts), inputs, pretrained=stored.select)


def pairs(encoder: TextEncoder, count: int, seed: int) -> PairDataset:
    images = planted([1] * count, seed).images
    return PairDataset(images, captions(encoder, sentences(count, seed)), torch.arange(count))


def training(encoder: TextEncoder) -> TrainingSet:
    pair_dataset = pairs(encoder, 48, 1)
    labels = F.one_hot(torch.arange(48) % 3).bool()
    prompts = PairDataset(
        pair_dataset.images, captions(encoder, [WORDS[i % 3] for i in range(48)]), torch.arange(48)
    )
    return TrainingSet(pair_dataset, torch.arange(48), labels, prompts)


def weights(method: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The text encoder of a method, name to a copy of the weights."""
    found = {name: value.clone() for name, value in method.state_dict().items() if "encoders.text" in name}
    return {name[name.index("encoders") :]: value for name, value in found.items()}


@pytest.mark.parametrize("name", GRADIENT)
def test_a_method_changes_its_own_copy_and_embeds_by_it(name: str, encoder: TextEncoder) -> None:
    settings = config(encoder)
    method, other = (make_method(name, settings, WIDTH, 0, {}) for _ in range(2))
    pretrained = {f"encoders.{key}": value for key, value in load_tuned(settings).state_dict().items()}
    held_out, seen = pairs(encoder, 12, 2), []

    def validate() -> float:
        seen.append((weights(method), method.embeddings(held_out)[1].clone()))
        return float(len(seen))

    method.fit(training(encoder), validate)
    method.eval()
    (before, early), (after, late) = seen[:2]
    assert weights(other).keys() == pretrained.keys() == after.keys()
    assert all(torch.equal(value, pretrained[key]) for key, value in weights(other).items())
    for one, two in ((pretrained, before), (before, after)):
        # No caption has a position behind the longest one, or the piece of another vocabulary.
        moved = [key for key in one if not torch.equal(one[key], two[key])]
        assert len(moved) > 0.8 * len(one)
    assert not torch.allclose(early, late), "validation sees each epoch's encoder"

    if isinstance(method, DualEncoder) and not method.reranks and not isinstance(method, VSEInf):
        nodes = method.encoders["text"](held_out.captions.read(torch.arange(12)))
        means = torch.stack([part.mean(0) for part in nodes.values.split(nodes.counts.tolist())])
        expected = method.heads.embed("token", method.heads.whiten("token", means)) * method.scale.sqrt()
        torch.testing.assert_close(method.embeddings(held_out)[1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GRADIENT)
def test_a_method_trains_adapters_of_both_encoders(name: str, encoder: TextEncoder, vit: Path) -> None:
    pytest.importorskip("peft")
    lora = f"features.vision={vit}", "training.tune.vision=1", "training.tune.lora=2"
    settings, width = config(encoder, *lora), {"patch": 16, "token": 16}
    images = drawn(settings, 48)
    train = training(encoder)
    prompts = None if train.prompts is None else replace(train.prompts, images=images)
    train = replace(train, pair_dataset=replace(train.pair_dataset, images=images), prompts=prompts)
    held_out = replace(pairs(encoder, 12, 2), images=drawn(settings, 12))
    method, other = (make_method(name, settings, width, 0, {}) for _ in range(2))
    method.fit(train, lambda: 0.0)
    method.eval()
    adapters = {key: value for key, value in method.state_dict().items() if "encoders" in key}
    assert {part for key in adapters for part in ("image", "text") if f"encoders.{part}" in key} == {
        "image",
        "text",
    }
    begun = other.state_dict()
    for key, value in adapters.items():
        assert begun[key].abs().max() == 0 or key.endswith("A.weight")
        assert not torch.equal(value, begun[key])

    def found() -> list[torch.Tensor]:
        scores = [method.pairs(held_out, torch.arange(12), torch.arange(12))] if method.reranks else []
        return [*method.embeddings(held_out), *scores]

    before = [value.clone() for value in found()]
    with torch.no_grad():
        for key, parameter in method.named_parameters():
            if "encoders.image" in key:
                parameter.add_(0.5)
    changed = [not torch.allclose(one, two, atol=1e-4) for one, two in zip(found(), before, strict=True)]
    assert changed == [True, False, True][: len(changed)]


@pytest.mark.parametrize("name", ["albef", "uniter", "gat", "scan", "laps", "cmfg"])
def test_joint_scores_are_by_the_encoder_as_it_is(name: str, encoder: TextEncoder) -> None:
    method, held_out = make_method(name, config(encoder), WIDTH, 0, {}), pairs(encoder, 12, 2)
    method.fit(training(encoder), lambda: 0.0)
    image, caption = torch.tensor([3, 3, 0, 7]), torch.tensor([1, 5, 5, 11])
    before = method.pairs(held_out, image, caption)
    alone = [method.pairs(held_out, image[i : i + 1], caption[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), before, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for parameter in (p for key, p in method.named_parameters() if "encoders.text" in key):
            parameter.mul_(1.3)
    assert not torch.allclose(method.pairs(held_out, image, caption), before, atol=1e-4)


@pytest.mark.parametrize("name", ["clip-head", "simclr", "uniter", "gat"])
def test_without_a_learning_rate_it_is_the_method_of_frozen_features(name: str, encoder: TextEncoder) -> None:
    live, held_out = training(encoder), pairs(encoder, 12, 2)
    texts = live.pair_dataset.captions
    assert texts.pretrained is not None
    stored = ItemSet("text", texts.count, texts.pretrained)
    frozen = TrainingSet(PairDataset(live.pair_dataset.images, stored, torch.arange(48)), live.texts)
    given = {"learning_rate": 1e-3, "weight_decay": 0.0}
    tuned = make_method(name, config(encoder, "training.tune.learning_rate=0"), WIDTH, 0, given)
    tuned.fit(live, lambda: 0.0)
    plain = make_method(name, config(encoder, tune="null"), WIDTH, 0, {**given, "epochs": 2})
    plain.fit(frozen, lambda: 0.0)
    assert held_out.captions.pretrained is not None
    seen = PairDataset(held_out.images, ItemSet("text", 12, held_out.captions.pretrained), torch.arange(12))
    for mine, theirs in zip(tuned.embeddings(held_out), plain.embeddings(seen), strict=True):
        # Adam takes a small gradient's sign for its size, and clipping sees the encoder's gradient too.
        torch.testing.assert_close(mine, theirs, atol=1e-2, rtol=1e-2)


def test_methods_that_cannot_are_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    settings = config(encoder)
    for name in METHODS.keys() - set(GRADIENT):
        with pytest.raises(ConfigError, match=f"methods: {name} does not learn by gradient"):
            make_method(name, settings, WIDTH, 0, {})
        make_method(name, config(encoder, tune="null"), WIDTH, 0, {})
    tune = f"overrides=[training.tune.text=all,features.text={encoder._folder}]"
    result = cmfg("bench", "-c", "smoke", "methods=[clip-head,cca]", tune, "-o", tmp_path / "bench")
    assert result.code == 2
    assert "cca does not learn by gradient" in result.err
    assert not (tmp_path / "bench").exists()


def test_a_cell_depends_on_what_is_tuned(encoder: TextEncoder) -> None:
    plain, other = config(encoder, tune="null"), config(encoder)
    changed = [config(encoder, "training.epochs=3"), config(encoder, "training.tune.learning_rate=0.1")]
    for name in GRADIENT:
        assert len({recipe_of(name, each) for each in (plain, other, *changed)}) == 4
    method = make_method("clip-head", other, WIDTH, 0, {})
    assert isinstance(method, DualEncoder)
    assert method.epochs == 2
    longer = make_method("clip-head", other, WIDTH, 0, {"epochs": 5})
    assert isinstance(longer, DualEncoder)
    assert longer.epochs == 5


def test_no_setting_of_cmfg_alone_tunes(encoder: TextEncoder) -> None:
    from cmfg_dgl.config import load_bench

    bench = load_bench("smoke", ["settings={cmfg: [{training.tune.text: all}]}"])
    with pytest.raises(ConfigError, match=r"training\.tune\.text is what all methods have"):
        check_settings(bench, {"smoke": config(encoder)})
