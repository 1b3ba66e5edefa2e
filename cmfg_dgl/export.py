"""A model as files: read from a run, an exported folder, a hub repository or an aligned model, and written."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, snapshot_download

from cmfg_dgl import __version__
from cmfg_dgl.config import Config, config_from_mapping
from cmfg_dgl.config.text import absolute, placeless, resolve_paths
from cmfg_dgl.errors import CheckpointError, ConfigError
from cmfg_dgl.features.encoders.load import load_encoders
from cmfg_dgl.features.encoders.text import TextEncoder
from cmfg_dgl.features.encoders.vision import VisionEncoder
from cmfg_dgl.files import canonical_json, read_json, sha256_bytes, sha256_file, write_json
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.ownership import refuse_changed
from cmfg_dgl.reporting.matcher_card import matcher_card
from cmfg_dgl.retrieval.query_bank import QueryBank, load_query_bank, save_query_bank
from cmfg_dgl.training.checkpoint import save_checkpoint
from cmfg_dgl.training.experiment import restore_model, select_device
from cmfg_dgl.training.run_directory import Run, open_run

__all__ = ["Parts", "parts_of", "parts_of_run", "push_parts", "save_parts"]

_log = logging.getLogger(__name__)

FORMAT = 1
RECORD, WEIGHTS, BANK, CARD = "matcher.json", "weights.safetensors", "query-bank.safetensors", "README.md"
ALIGNED = "config.json"
"""A file of every model of transformers, and of nothing that cmfg writes."""

VERSIONS = ("transformers", "library")
"""Parts of an encoder's description that name a library's version: another one is said, not refused."""


class Parts(NamedTuple):
    """What a `Matcher` is made of, with its words."""

    config: Config
    model: CMFG | None
    vision: VisionEncoder
    text: TextEncoder
    query_bank: QueryBank | None
    alpha: float
    provenance: Mapping[str, Any]


def parts_of(source: str | Path, device: str) -> Parts:
    """Read a run directory, an exported folder, an aligned model or a hub repository; see `Matcher.load`."""
    folder = Path(source).expanduser()
    if (folder / RECORD).is_file():
        return _load_exported(folder, device)
    if (folder / "config.yaml").is_file():
        return parts_of_run(open_run(str(folder), [f"run.device={device}"]))
    if (folder / ALIGNED).is_file():
        return _parts_of_aligned(str(source), device)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(
            f"{source}: no trained model here (neither {RECORD} nor config.yaml, nor {ALIGNED} of an aligned "
            f"model); train one with cmfg train -o {source}"
        )
    downloaded = _download(str(source))
    if not (downloaded / RECORD).is_file():
        return _parts_of_aligned(str(source), device)
    return _load_exported(downloaded, device)


def _parts_of_aligned(source: str, device: str) -> Parts:
    """An aligned model as it is, by a name on the hub or a folder: no graph, and nothing trained."""
    settings = {
        "features": {"aligned": source},
        "retrieval": {"correction": "none"},
        "run": {"device": device},
    }
    config = resolve_paths(config_from_mapping(settings, source))
    select_device(config)
    vision, text = load_encoders(config)
    # What is missing of the model is said now, not with the first picture.
    vision.describe()
    return Parts(config=config, model=None, vision=vision, text=text, query_bank=None, alpha=0.0, provenance={})


def parts_of_run(run: Run) -> Parts:
    """The trained model of a run, with the overrides and on the device of its configuration.

    Raises
    ------
    CheckpointError
        If the training is not finished, or a file of the run is damaged.
    """
    selection = run.read("selection.json")
    config = run.config
    vision, text = load_encoders(config)
    given = config.retrieval.alpha
    return Parts(
        config=config,
        model=restore_model(config, {"patch": vision.width, "token": text.width}, run.best),
        vision=vision,
        text=text,
        query_bank=None if config.retrieval.correction == "none" else _query_bank(run),
        alpha=selection["alpha"] if given is None else given,
        provenance={**run.read("training.json"), "selection": selection},
    )


def _query_bank(run: Run) -> QueryBank:
    if not run.query_bank.is_file():
        raise CheckpointError(
            f"{run.query_bank}: missing; give retrieval.correction=none, or train a run with a correction"
        )
    bank, asked = load_query_bank(run.query_bank), run.config.retrieval.query_bank
    if bank.size != asked:
        raise ConfigError(
            f"retrieval.query_bank {asked}: the run was trained with {bank.size}; leave it out, or train another "
            "run"
        )
    return bank


def save_parts(parts: Parts, folder: Path, *, force: bool) -> Path:
    """Write an exported folder, whole or not at all; see `Matcher.save`."""
    folder = Path(absolute(str(folder)))
    _check_free(folder, force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        _write(parts, made)
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        made.rename(folder)
    return folder


def push_parts(parts: Parts, repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload an exported folder to a hub repository; see `Matcher.push_to_hub`."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_parts(parts, Path(temporary) / "model", force=False)
        message = "Upload a cmfg-dgl model"
        commit = api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=message)
    return str(commit.commit_url)


def _check_free(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if not held and folder.is_dir():
        return
    if RECORD not in held or held - {RECORD, WEIGHTS, BANK, CARD}:
        raise ConfigError(f"{folder}: holds something else than an exported model; choose another folder")
    if not force:
        raise ConfigError(f"{folder}: holds an exported model; add --force (force=True) to replace it")
    try:
        written = read_json(folder / RECORD).get("card_sha256")
    except (OSError, ValueError, AttributeError):  # damaged, which --force is to mend
        return
    if CARD in held and written is not None:
        refuse_changed(folder / CARD, [written])


def _write(parts: Parts, folder: Path) -> None:
    names = []
    if parts.model is not None:
        save_checkpoint(folder / WEIGHTS, parts.model.state_dict(), {})
        names.append(WEIGHTS)
    if parts.query_bank is not None:
        save_query_bank(folder / BANK, parts.query_bank)
        names.append(BANK)
    config = _merged(placeless(parts.config))
    body = {
        "format": FORMAT,
        "cmfg_dgl": __version__,
        "config": asdict(replace(config, run=replace(config.run, device="cpu"))),
        "alpha": parts.alpha,
        "encoders": {"vision": parts.vision.describe(), "text": parts.text.describe()},
        "widths": {"patch": parts.vision.width, "token": parts.text.width},
        "provenance": dict(parts.provenance),
        "files": {name: sha256_file(folder / name) for name in names},
    }
    (folder / CARD).write_text(matcher_card(body), encoding="utf-8")
    body["card_sha256"] = sha256_file(folder / CARD)
    write_json(folder / RECORD, {**body, "sha256": sha256_bytes(canonical_json(body))})


def _merged(config: Config) -> Config:
    """The configuration of the same model without adapters: they are part of the weights, as in `restore_model`."""
    tune = replace(config.training.tune, lora=None)
    return replace(config, training=replace(config.training, tune=tune))


def _load_exported(folder: Path, device: str) -> Parts:
    record = _read_record(folder)
    values = {**record["config"], "run": {**record["config"]["run"], "device": device, "output_dir": str(folder)}}
    config = config_from_mapping(values, str(folder / RECORD))
    vision, text = load_encoders(config)
    for modality, encoder in (("vision", vision), ("text", text)):
        key = f"features.{modality}" if config.features.aligned is None else "features.aligned"
        _check_encoder(folder, key, record["encoders"][modality], encoder.describe())
    return Parts(
        config=config,
        model=restore_model(config, record["widths"], folder / WEIGHTS) if WEIGHTS in record["files"] else None,
        vision=vision,
        text=text,
        query_bank=load_query_bank(folder / BANK) if BANK in record["files"] else None,
        alpha=record["alpha"],
        provenance=record["provenance"],
    )


def _read_record(folder: Path) -> dict[str, Any]:
    """`matcher.json`, checked against its own digest, and the other files against theirs."""
    path = folder / RECORD
    damaged = f"{path}: damaged; export the model again with cmfg export"
    try:
        record = read_json(path)
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(damaged) from None
    if not isinstance(record, dict) or record.pop("sha256", None) != sha256_bytes(canonical_json(record)):
        raise CheckpointError(damaged)
    if record["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format {record['format']}, and this version of cmfg-dgl reads format {FORMAT}; install "
            f"cmfg-dgl {record['cmfg_dgl']}"
        )
    for name, digest in record["files"].items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing; export the model again with cmfg export")
        if sha256_file(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: damaged; export the model again with cmfg export")
    return record


def _check_encoder(folder: Path, key: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse an encoder with other weights or other preprocessing than the one that the model was trained with."""
    differing = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    serious = [name for name in differing if name not in VERSIONS]
    if serious:
        raise CheckpointError(
            f"{folder}: {key} differs in {', '.join(serious)} from the encoder that the model was trained with; "
            "install that encoder, or train again"
        )
    for name in differing:
        _log.warning("%s: %s was %s at training and is %s here", key, name, then.get(name), now.get(name))


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[RECORD, WEIGHTS, BANK, CARD]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise CheckpointError(
            f"{name}: no such folder, and no model on the hub ({reason}); give a run directory or an exported "
            "folder"
        ) from None
