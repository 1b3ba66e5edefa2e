"""Audit a trained run on its test split."""

from __future__ import annotations

from typing import Any

from cmfg_dgl.data.splits import shared_items
from cmfg_dgl.evaluation.audit import audit
from cmfg_dgl.jobs.results import Progress, graph_scorer, known_result, result_identity, run_scorer, trained_model
from cmfg_dgl.reporting.report import write_card, write_report
from cmfg_dgl.training.checkpoint import load_checkpoint
from cmfg_dgl.training.experiment import Experiment, select_device
from cmfg_dgl.training.run_directory import Run

__all__ = ["audit_run"]


def audit_run(run: Run, *, force: bool, progress: Progress) -> dict[str, Any]:
    """Audit a trained run on its test split; a report that is there already is given again.

    Returns
    -------
    dict
        What `audit.json` holds.
    """
    select_device(run.config)
    weights, _ = load_checkpoint(run.best)
    experiment = Experiment.prepare(run.config, progress)
    view = experiment.evaluation_split("test")
    made_from, dataset = result_identity(run, experiment, "test"), experiment.dataset
    if (run.folder / "audit.json").is_file() and not force:
        return known_result(run, "audit.json", made_from)
    names: list[str] = []

    def report(name: str) -> None:
        names.append(name)
        progress("audit", len(names) - 1, 8, name)

    result = audit(
        run_scorer(run, trained_model(run, experiment, weights), None),
        graph_scorer(experiment.model(run.config.run.seed + 1), run.config, None),
        experiment.pair_dataset(view),
        shared_with_training=shared_items(
            run.read("manifest-train.json"), dataset.manifest("test"), texts=not dataset.published
        ),
        compared=dataset.compared,
        progress=report,
    )
    progress("audit", 8, 8)
    record = {**result.record(), "protocol": made_from["protocol"], "made_from": made_from}
    run.write("audit.json", record)
    write_card(run.folder)
    write_report(run.folder)
    return record
