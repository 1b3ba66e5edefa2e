"""Pins of backbones under torch.compile.

- Batches of any size give what the function gives, from one compiled graph for one size.
- What fills a smaller batch up changes no result.
- What cannot be compiled is an error of one line, with the remedy.
- Plain encoders keep their description, and compiled ones have another.
- The real compiler (slow): the nodes of the stem and of a ViT are the plain ones within 1e-4.
"""

from functools import partial

import pytest
import torch
from test_vision import pictures, save_model

from cmfg_dgl.errors import ConfigError
from cmfg_dgl.features.encoders.compiled import CompiledBatches
from cmfg_dgl.features.encoders.load import load_vision


def test_batches_of_all_sizes_run_one_graph(monkeypatch):
    compiled_for = []

    def compiler(graph, inputs):
        compiled_for.append([tuple(tensor.shape) for tensor in inputs])
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    compiled = CompiledBatches(lambda batch: batch.cumsum(1).tanh(), 4)
    for count in (4, 3, 1, 9, 2):
        batch = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
        torch.testing.assert_close(compiled(batch), batch.cumsum(1).tanh())
    assert compiled_for == [[(4, 3)]]


def test_what_cannot_be_compiled_is_one_line(monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("No working compiler\nand more")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fails))
    with pytest.raises(ConfigError, match=r"features\.compile: .*No working compiler.*g\+\+.*false") as caught:
        CompiledBatches(lambda batch: batch + 1, 4)(torch.ones(2, 3))
    assert "\n" not in str(caught.value)


def test_the_description_tells_compiled_from_plain(tmp_path):
    save_model(tmp_path, "vit")
    for name in ("hybrid", str(tmp_path)):
        plain, compiled = (
            load_vision(name, image_size=64, device="cpu", compile_batch=batch).describe() for batch in (None, 4)
        )
        assert "compiled" not in plain
        assert compiled == {**plain, "compiled": f"torch {torch.__version__}"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hybrid", "vit"])
def test_compiled_nodes_are_the_plain_ones(tmp_path, family):
    if family == "vit":
        save_model(tmp_path, family)
    name = family if family == "hybrid" else str(tmp_path)
    torch._dynamo.reset()
    compiled = load_vision(name, image_size=64, device="cpu", compile_batch=4)
    images = pictures((64, 64), (30, 100), (64, 64), (70, 50), (64, 64), (64, 20))
    plain, nodes = load_vision(name, image_size=64, device="cpu").encode(images), compiled.encode(images)
    assert torch.equal(nodes.grid, plain.grid)
    assert plain.values.abs().max() > 1
    torch.testing.assert_close(nodes.values, plain.values, rtol=1e-4, atol=1e-4)
    # The same three beside a fourth picture, and beside a copy of the third.
    few = compiled.encode(images[:3]).values
    assert torch.equal(few, nodes.values[: len(few)])
