"""The tables of a run: its results, its data, its model and its environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmfg_dgl.config import FeaturesConfig
from cmfg_dgl.reporting.run_results import Record, Results
from cmfg_dgl.reporting.tables import Table, text_table
from cmfg_dgl.reporting.vocabulary import (
    DIRECTIONS,
    NOTHING,
    RECALL_AT_K_BOUND,
    STAGES,
    formatted,
    metric_title,
    shown,
)

__all__ = ["data_table", "environment_table", "model_table", "point_rows", "quarantine_table", "result_tables"]

STAGE_HEADS = [name.capitalize() for name in STAGES.values()]


def result_tables(record: Record) -> list[Table]:
    """Both stages side by side: sums, then every metric in both directions; of folds and by label, if any."""
    first, second = record["first_stage"], record["two_stage"]
    chance = formatted("rsum", first["chance_rsum"])
    split, protocol = record["split"], record["protocol"]
    sums = [
        ("rsum, of 600", *(formatted("rsum", stage["rsum"]) for stage in (first, second))),
        ("rsum of chance", *(formatted("rsum", stage["chance_rsum"]) for stage in (first, second))),
        *(
            (f"{RECALL_AT_K_BOUND}, {way}, %", NOTHING, formatted("R", second["recall_at_k_bound"][key]))
            for key, way in DIRECTIONS.items()
        ),
        ("candidates re-ranked, k", NOTHING, formatted("k", second["k"])),
        ("weight of the joint score, alpha", NOTHING, formatted("alpha", float(second["alpha"]))),
    ]
    caption = f"Both directions on the {split} split; chance is an rsum of {chance}. Protocol {protocol}."
    tables = [
        text_table(f"Sums on the {split} split. Protocol {protocol}.", ("", *STAGE_HEADS), sums),
        _metric_table(caption, record),
    ]
    if "folds" in record:
        folds = record["folds"]
        each = " and ".join(formatted("rsum", folds[stage]["rsum"]) for stage in STAGES)
        caption = (
            f"Mean over {folds['folds']} folds of {folds['n_images']:,} images of the {split} split, each searched "
            f"by itself; rsum of one and of two stages: {each}. Protocol {protocol}."
        )
        tables.append(_metric_table(caption, folds))
    if "label" in record:
        label, gallery = record["label"], record["label"]["gallery"]
        caption = (
            f"Label relevance on the {split} split: right is what shares one of {label['labels']} labels with the "
            f"query. Gallery {', '.join(gallery['splits'])}, {gallery['n_images']:,} images; mAP@all of chance "
            f"{formatted('%', label['chance'])} %. Not comparable with instance relevance. Protocol {protocol}."
        )
        tables.append(_metric_table(caption, label))
    if "hard_negatives" in record:
        negatives = record["hard_negatives"]
        caption = (
            f"Hard negatives of the {split} split: % of false captions, made of the very words of an image's own, "
            f"that score lower than it; chance is 50. Protocol {protocol}."
        )
        kinds = negatives["first_stage"]
        rows = [(kind, *(formatted("%", negatives[stage][kind]) for stage in STAGES)) for kind in kinds]
        tables.append(text_table(caption, ("exchanged", *STAGE_HEADS), rows))
    return tables


def _metric_table(caption: str, record: Record) -> Table:
    """Every metric of both stages and directions."""
    columns = [record[stage][way] for stage in STAGES for way in DIRECTIONS]
    metrics = [(metric_title(key), *(formatted(key, column[key]) for column in columns)) for key in columns[0]]
    return text_table(
        caption,
        ("Metric", *DIRECTIONS.values(), *DIRECTIONS.values()),
        metrics,
        groups=tuple((head, len(DIRECTIONS)) for head in STAGE_HEADS),
    )


def data_table(results: Results) -> Table:
    """How many items there are of each split, and what was left out of training."""
    training = results.training
    rows = [
        ("images trained on", formatted("", training["train_images"])),
        ("captions trained on", formatted("", training["train_captions"])),
        ("images validated on", formatted("", training["val_images"])),
        *(
            (f"{what} of the {e.record['split']} split", formatted("", e.record[f"n_{what}"]))
            for e in results.evaluations
            for what in ("images", "captions")
        ),
        (
            "captions that share a group of near-duplicates, and so a split",
            formatted("", training["near_duplicates"]),
        ),
        ("captions cut at features.max_tokens", formatted("", training["truncated_captions"])),
        ("items quarantined", formatted("", len(training["quarantined"]))),
        ("parameters trained", formatted("", training["parameters"])),
        ("seconds of training", formatted("", training["seconds"])),
        ("protocol of the training split", training["protocol"]),
        ("protocol of the validation split", training["validation_protocol"]),
    ]
    return text_table(
        f"What the model was trained and measured on: {results.dataset}", ("", "Value"), rows, names=2
    )


def quarantine_table(results: Results) -> Table:
    """The items left out of training, each with its reason."""
    rows = list(results.training["quarantined"].items())
    return text_table("Quarantined items: left out of training", ("Item", "Reason"), rows, names=2)


def model_table(results: Results) -> Table:
    """Encoders, relations and sizes."""
    config = results.run.config
    model, relations = config.model, config.graph.relations
    used = [
        f"{name} ({r.source} → {r.target}, {r.topology})" for name, r in relations.items() if r.topology != "none"
    ]
    rows = [
        *_encoder_rows(config.features),
        ("relations", "; ".join(used)),
        ("stacking", model.stacking),
        ("layers", str(model.layers)),
        ("width", str(model.width)),
        ("heads", str(model.heads)),
        ("parameters trained", formatted("", results.training["parameters"])),
        ("seed", str(config.run.seed)),
    ]
    return text_table("Settings of the model", ("", "Value"), rows, names=2)


def _encoder_rows(features: FeaturesConfig) -> list[tuple[str, str]]:
    """The frozen encoders, each with what it encodes."""
    if features.aligned is not None:
        return [("image and text encoder, frozen", features.aligned)]
    return [("image encoder, frozen", features.vision), ("text encoder, frozen", features.text)]


def environment_table(environment: Record) -> Table:
    """Versions, machine and devices, one a row."""
    flat: dict[str, Any] = {}
    for key, value in environment.items():
        flat |= {f"{key}: {k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    rows = [(key, _environment_value(value)) for key, value in flat.items()]
    return text_table("Versions, machine, kernels and devices at training", ("", "Value"), rows, names=2)


def _environment_value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not installed" if value is None else str(value)


def point_rows(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> list[tuple[str, ...]]:
    """The points of curves as rows, one for each place that a curve has a point at."""
    columns = [dict(zip(x, y, strict=True)) for x, y in curves.values()]
    places = sorted({place for column in columns for place in column})
    return [(f"{x:g}", *(shown("percent", column.get(x)) for column in columns)) for x in places]
