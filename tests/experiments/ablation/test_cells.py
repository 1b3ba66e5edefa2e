"""Pins of a cell of an ablation, on planted pairs.

- Both stages are those of the model with the hubness correction of its configuration, whose query bank is the
  training split, embedded by the model at hand.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from planted import planted, tiny_model

from cmfg_dgl.config import load_config
from cmfg_dgl.evaluation.evaluate import choose_alpha, first_stage, score, two_stage
from cmfg_dgl.experiments.ablation.cells import evaluated
from cmfg_dgl.retrieval.hubness import corrected
from cmfg_dgl.retrieval.query_bank import fit_correction
from cmfg_dgl.retrieval.scorer import GraphScorer


@pytest.mark.parametrize("correction", ["hubness", "csls", "none"])
def test_a_cell_is_corrected_against_the_training_split(correction: str) -> None:
    splits = [planted([1] * count, seed=seed) for count, seed in ((60, 1), (20, 2), (30, 3))]
    training, val, test = (SimpleNamespace(pair_dataset=split) for split in splits)
    data: Any = SimpleNamespace(training=training, val=val, test=test)
    config = load_config(
        None, [f"retrieval.correction={correction}", "retrieval.k=4", "retrieval.inverse_temperature=60"]
    )
    model = tiny_model().eval()
    scorer = GraphScorer(model)
    scorer = corrected(scorer, fit_correction(scorer, splits[0], config.retrieval))
    alpha, curve = choose_alpha(score(scorer, splits[1], k=4))
    scores = score(scorer, splits[2], k=4)
    cell = evaluated(model, data, config, "test")
    assert (cell["alpha"], cell["val_rsum"]) == (alpha, max(curve))
    assert cell["stages"]["first_stage"]["rsum"] == first_stage(scores)[0]["rsum"]
    assert cell["stages"]["two_stage"]["rsum"] == two_stage(scores, alpha)[0]["rsum"]
