"""Audit a trained run on its test split."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cmfg_dgl.evaluation.audit import BankEvidence, audit
from cmfg_dgl.evaluation.overlap import training_overlap
from cmfg_dgl.jobs.results import Progress, known_result, result_identity
from cmfg_dgl.matcher import Matcher
from cmfg_dgl.reporting.report import write_card, write_report
from cmfg_dgl.retrieval.scorer import GraphScorer
from cmfg_dgl.training.experiment import Experiment, select_device
from cmfg_dgl.training.run_directory import Run, hold_run

__all__ = ["audit_run"]


def audit_run(run: Run, *, force: bool, progress: Progress) -> dict[str, Any]:
    """Audit a trained run on its test split; a report that is there already is given again.

    Returns
    -------
    dict
        What `audit.json` holds.
    """
    with hold_run(run, "cmfg audit"):
        select_device(run.config)
        matcher, experiment = Matcher.of_run(run), Experiment.prepare(run.config, progress, evaluated=("test",))
        view = experiment.evaluation_split("test")
        made_from = result_identity(run, experiment, "test")
        if (run.folder / "audit.json").is_file() and not force:
            return known_result(run, "audit.json", made_from)
        manifest = run.read("manifest-train.json")
        progress("audit", 0, 1, "comparing test with training")
        result = audit(
            matcher.scorer,
            GraphScorer(experiment.model(run.config.run.seed + 1), pair_batch=run.config.retrieval.pair_batch),
            experiment.pair_dataset(view),
            overlap=training_overlap(experiment.dataset, manifest),
            bank=None if matcher.query_bank is None else lambda: _bank_evidence(matcher, experiment, manifest),
            progress=functools.partial(progress, "audit"),
        )
        progress("audit", len(result.checks), len(result.checks))
        record = {**result.record(), "protocol": made_from["protocol"], "made_from": made_from}
        run.write("audit.json", record)
        write_card(run.folder)
        write_report(run.folder)
        return record


def _bank_evidence(matcher: Matcher, experiment: Experiment, manifest: dict[str, Any]) -> BankEvidence:
    """The query bank of a run beside its training split: ids that are not in it, and its items embedded again."""
    bank, dataset = matcher.query_bank, experiment.dataset
    assert bank is not None
    trained = {item["image"] for item in manifest["items"]}
    images = {image.id: i for i, image in enumerate(dataset.images) if image.id in trained}
    captions = {c.id: n for n, c in enumerate(dataset.captions) if dataset.images[c.image].id in trained}
    foreign = [name for name in bank.image_ids if name not in images]
    foreign += [name for name in bank.text_ids if name not in captions]
    if foreign:
        return BankEvidence(tuple(foreign), (bank.images, bank.texts), (bank.images, bank.texts))
    ends = (
        experiment.items("image", torch.tensor([images[name] for name in bank.image_ids])),
        experiment.items("text", torch.tensor([captions[name] for name in bank.text_ids])),
    )
    scorer = matcher.graph_scorer()
    expected = scorer.embed_items(ends[0]), scorer.embed_items(ends[1])
    return BankEvidence((), (bank.images, bank.texts), expected)
