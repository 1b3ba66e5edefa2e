"""Whether a stored evaluation still holds, told in a second: nothing here imports torch or reads a feature."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from cmfg_dgl.config import PACKAGED_ENCODERS, Config
from cmfg_dgl.config.directories import features_directory
from cmfg_dgl.config.text import joined_encoders, placeless
from cmfg_dgl.data.cache import cached_in
from cmfg_dgl.data.dataset import Dataset
from cmfg_dgl.data.load import read_dataset
from cmfg_dgl.environment import package_versions
from cmfg_dgl.evaluation.definitions import DEFINITIONS
from cmfg_dgl.features.encoders.pretrained import describe_folder, locate_model
from cmfg_dgl.files import canonical_json, sha256_bytes, sha256_file
from cmfg_dgl.training.run_directory import Run

__all__ = ["evaluation_inputs", "stored_evaluation"]


def stored_evaluation(run: Run, split: str, *, folds: int | None, ogb: bool) -> dict[str, Any] | None:
    """The result that `cmfg eval` stored, if all that it depends on is as it was; None where that is not so.

    Nothing is written, and the run is not locked.

    Raises
    ------
    DataError
        If the data set cannot be read.
    """
    path = run.folder / f"evaluation-{split}.json"
    if not path.is_file():
        return None
    record: dict[str, Any] = run.read(path.name)
    known = record.get("inputs") if isinstance(record, dict) else None
    if known is None or (ogb and "ogb" not in record):
        return None
    dataset = read_dataset(run.config.data, features_directory(run.config))
    return record if known == evaluation_inputs(run, dataset, split, folds) else None


def evaluation_inputs(run: Run, dataset: Dataset, split: str, folds: int | None) -> str:
    """Digest of all that an evaluation depends on: settings, files of the run, data, encoders, versions."""
    config, settings = run.config, placeless(run.config)
    files = (run.best, run.query_bank, run.folder / "selection.json")
    with cached_in(features_directory(config)):
        encoders = [_encoder(name, key) for name, key in _named_encoders(config)]
    inputs = {
        "settings": asdict(replace(settings, run=replace(settings.run, device=""))),
        "files": [sha256_file(path) if path.is_file() else None for path in files],
        "protocols": {name: dataset.protocol(name) for name, found in dataset.splits.items() if len(found)},
        "bad": [[item.id, item.reason] for item in dataset.bad],
        "encoders": encoders,
        "packages": package_versions(),
        "definitions": DEFINITIONS,
        "ranking": [split, folds],
    }
    return sha256_bytes(canonical_json(inputs))


def _named_encoders(config: Config) -> list[tuple[str, str]]:
    features = config.features
    if features.aligned is not None:
        return [(features.aligned, "features.aligned")]
    images = [(name, "features.vision") for name in joined_encoders(features.vision)]
    return [*images, (features.text, "features.text")]


def _encoder(name: str, key: str) -> Any:
    """What identifies an encoder; those of packages follow the packages' versions."""
    return name if name in PACKAGED_ENCODERS else describe_folder(locate_model(name, key, name))
