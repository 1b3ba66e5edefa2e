"""The columns of a comparison: plain first-stage scores, and scores with a hubness correction."""

from __future__ import annotations

from dataclasses import replace

from cmfg_dgl.config import Config
from cmfg_dgl.experiments.baselines.method import Method
from cmfg_dgl.experiments.bench.data import BenchData
from cmfg_dgl.experiments.bench.methods import method_class
from cmfg_dgl.retrieval.hubness import Correction
from cmfg_dgl.retrieval.query_bank import fit_correction

__all__ = ["PLAIN", "column_correction", "columns_of"]

PLAIN = "none"
CORRECTED = "hubness"


def columns_of(name: str, config: Config, *, leaky: bool = False) -> tuple[str, ...]:
    """Names of the corrections with which a method is measured, first the one by which its setting is chosen.

    Every method of real-valued embeddings is measured plain and corrected: by the recipe's correction, or by
    `hubness` where the recipe has none. Hash codes have the plain column alone, since a corrected code is no code,
    and so have leaky vectors, which are no embeddings of an item.

    Parameters
    ----------
    leaky
        By the matched-pair protocol, see `make_method`.
    """
    if leaky or method_class(name).hashes:
        return (PLAIN,)
    chosen = config.retrieval.correction
    return (PLAIN, CORRECTED) if chosen == PLAIN else (chosen, PLAIN)


def column_correction(column: str, method: Method, data: BenchData) -> Correction | None:
    """The correction of a column, fitted on a method's embeddings of training items; None for the plain column."""
    retrieval = replace(data.config.retrieval, correction=column)
    return fit_correction(method, data.training.pair_dataset, retrieval)
