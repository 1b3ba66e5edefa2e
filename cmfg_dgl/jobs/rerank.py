"""The job behind `cmfg rerank`: what a second stage is worth over k and alpha, and behind other first stages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.evaluation.definitions import DEFINITIONS
from cmfg_dgl.evaluation.evaluate import ALPHAS, first_stage, first_stage_rsum, score
from cmfg_dgl.evaluation.rerank import curve, query_seconds
from cmfg_dgl.experiments.bench.data import BenchData
from cmfg_dgl.experiments.bench.methods import make_method
from cmfg_dgl.features.pair_dataset import PairDataset
from cmfg_dgl.files import sha256_file
from cmfg_dgl.jobs.results import Progress, known_result, result_identity
from cmfg_dgl.matcher import Matcher
from cmfg_dgl.ownership import claim
from cmfg_dgl.reporting.figures import png_bytes, svg_text
from cmfg_dgl.reporting.rerank_figure import rerank_figure
from cmfg_dgl.retrieval.embeddings import Embedded, read_embeddings, spread, write_embeddings
from cmfg_dgl.retrieval.hubness import corrected
from cmfg_dgl.retrieval.query_bank import fit_correction
from cmfg_dgl.retrieval.scorer import Scorer
from cmfg_dgl.training.experiment import Experiment, select_device
from cmfg_dgl.training.run_directory import Run, hold_run

__all__ = ["METHODS", "OWN", "rerank_run"]

OWN = "own"
METHODS = ("cca", "clip-head")

Record = dict[str, Any]
Sides = tuple[Tensor, Tensor]


def rerank_run(
    run: Run, split: str, *, ks: Sequence[int], first_stages: Sequence[str], force: bool, progress: Progress
) -> Record:
    """Measure re-ranking on a split, with every k and alpha, behind each first stage; finished parts are kept.

    The weight of the joint score is chosen on validation, which is therefore measured before any other split.

    Parameters
    ----------
    ks
        How many candidates are re-ranked. The joint scores of the largest serve for all.
    first_stages
        `own`, a name of `METHODS`, which is fitted on the run's training split, or a file as for `read_embeddings`.
    force
        Measure again, and replace what is there.

    Returns
    -------
    dict
        What `rerank-SPLIT.json` holds: {"dataset", "split", "protocol", "n_images", "n_captions", "alphas",
        "first_stages", "made_from"}. Of each first stage {"scale", "first_stage", "curves", "made_from"}: by what
        its scores were multiplied, its metrics alone, and for each k what `curve` gives, with `query_seconds`.

    Raises
    ------
    ConfigError
        If a first stage is unknown, or what is there was made from other weights, data or settings.
    DataError
        If a file does not fit the split.
    """
    for name in first_stages:
        _check_name(name)
    files = [Path(name).name for name in dict.fromkeys(first_stages) if name not in (OWN, *METHODS)]
    if len(set(files)) < len(files):
        raise ConfigError(f"--first-stage: two files of {', '.join(files)} have one name; rename one")
    select_device(run.config)
    with hold_run(run, "cmfg rerank"):
        job = _Job.prepare(run, tuple(dict.fromkeys(("val", split))), progress)
        stages = [job.first_stage(name) for name in first_stages]
        record = job.measure("val", ks, stages, force)
        if split != "val":
            record = job.measure(split, ks, stages, force, chosen=record)
    return record


def _check_name(name: str) -> None:
    if name not in (OWN, *METHODS) and not Path(name).is_file():
        raise ConfigError(
            f"--first-stage {name}: no such file; give {OWN}, {', '.join(METHODS)}, or a safetensors file"
        )


@dataclass(frozen=True)
class _FirstStage:
    """One first stage: its name in the record, what it is made from, and its embeddings of a split."""

    name: str
    made_from: Mapping[str, Any]
    embed: Callable[[str], Sides]


@dataclass(frozen=True)
class _Job:
    """A trained run and the splits on which its second stage is measured."""

    run: Run
    matcher: Matcher
    experiment: Experiment
    progress: Progress
    pair_datasets: Mapping[str, PairDataset]
    own: Callable[[str], Sides]

    @classmethod
    def prepare(cls, run: Run, splits: Sequence[str], progress: Progress) -> _Job:
        matcher, experiment = Matcher.of_run(run), Experiment.prepare(run.config, progress, evaluated=splits)
        pair_datasets = {name: experiment.pair_dataset(experiment.evaluation_split(name)) for name in splits}
        own = functools.cache(lambda split: matcher.scorer.embeddings(pair_datasets[split]))
        return cls(run, matcher, experiment, progress, pair_datasets, own)

    def measure(
        self,
        split: str,
        ks: Sequence[int],
        stages: Sequence[_FirstStage],
        force: bool,
        chosen: Record | None = None,
    ) -> Record:
        """Measure what `rerank-SPLIT.json` lacks; `chosen` is the record of validation, None for validation."""
        file = f"rerank-{split}.json"
        made_from = {**result_identity(self.run, self.experiment, split), "ks": list(ks), "metrics": DEFINITIONS}
        if (self.run.folder / file).is_file() and not force:
            record = known_result(self.run, file, made_from)
        else:
            record = self._empty(split) | {"made_from": made_from}
        for stage in stages:
            kept = record["first_stages"].get(stage.name)
            if kept is None:
                alphas = None if chosen is None else chosen["first_stages"][stage.name]["curves"]
                record["first_stages"][stage.name] = self._curves(stage, split, ks, alphas)
                self.run.write(file, record)
            elif kept["made_from"] != stage.made_from:
                raise ConfigError(
                    f"{self.run.folder / file}: {stage.name} was another one; add --force to replace all of it"
                )
        self._draw(record, split)
        return record

    def _empty(self, split: str) -> Record:
        """A record without any first stage; the run's own embeddings are written, a pattern for other files."""
        claim(self.run.folder, [f"embeddings-{split}.safetensors"])
        write_embeddings(
            self.run.folder / f"embeddings-{split}.safetensors",
            {
                f"{name}.{kind}": (ids, rows)
                for name in dict.fromkeys(("val", split))
                for kind, ids, rows in zip(("images", "captions"), self._ids(name), self.own(name), strict=True)
            },
        )
        view = self.experiment.evaluation_split(split)
        return {
            "dataset": self.experiment.dataset.name,
            "split": split,
            "protocol": self.experiment.dataset.protocol(split),
            "n_images": len(view.images),
            "n_captions": len(view.captions),
            "alphas": list(ALPHAS),
            "first_stages": {},
        }

    def _ids(self, split: str) -> tuple[list[str], list[str]]:
        """Ids of the images and of the captions of a split, in order."""
        dataset, view = self.experiment.dataset, self.experiment.evaluation_split(split)
        return [dataset.images[i].id for i in view.images], [dataset.captions[c].id for c in view.captions]

    def first_stage(self, name: str) -> _FirstStage:
        """A first stage by its name; a method of `METHODS` is fitted when it is first asked."""
        if name == OWN:
            return _FirstStage(name, {}, self.own)
        if name in METHODS:
            identity = {
                "train": self.experiment.dataset.protocol("train"),
                "seed": self.run.config.run.seed,
                "correction": self.run.config.retrieval.correction,
            }
            return _FirstStage(name, identity, functools.cache(self._fitted(name)))
        path = Path(name)
        return _FirstStage(
            path.name, {"sha256": sha256_file(path)}, lambda split: read_embeddings(path, split, *self._ids(split))
        )

    def _fitted(self, name: str) -> Callable[[str], Sides]:
        """A method of the comparison with the ridge and the hubness correction of the run."""
        data = BenchData(self.run.config, self.experiment)
        setting = {"ridge": data.config.model.ridge}
        method = make_method(name, data.config, data.widths, data.config.run.seed, setting)

        @functools.cache
        def fitted() -> Scorer:
            method.fit(data.training, lambda: first_stage_rsum(method, data.val.pair_dataset))
            method.eval()
            return corrected(method, fit_correction(method, data.training.pair_dataset, data.config.retrieval))

        def embed(split: str) -> Sides:
            return fitted().embeddings(self.pair_datasets[split])

        return embed

    def _scale(self, stage: _FirstStage) -> float:
        """What brings a first stage's scores to the spread of the run's own, so that one alpha means one thing."""
        theirs = spread(*stage.embed("val"))
        if not theirs:
            raise DataError(f"{stage.name}: gives every pair of val the same score; there is nothing to re-rank")
        return spread(*self.own("val")) / theirs

    def _curves(self, stage: _FirstStage, split: str, ks: Sequence[int], chosen: Sequence[Record] | None) -> Record:
        """Everything about a first stage; `chosen` are the curves of validation, whose alphas are used."""
        scale = self._scale(stage)
        images, captions = (rows * scale**0.5 for rows in stage.embed(split))
        pair_dataset, batch = self.pair_datasets[split], self.run.config.retrieval.query_batch
        second = self.matcher.graph_scorer(self.progress)
        scores = score(Embedded(images, captions, second), pair_dataset, k=max(ks), query_batch=batch)
        curves, seconds = [], query_seconds(self.matcher.graph_scorer(), pair_dataset, scores, ks)
        for number, k in enumerate(ks):
            alpha = None if chosen is None else chosen[number]["two_stage"]["alpha"]
            curves.append(curve(scores, k, alpha) | {"query_seconds": seconds[number]})
            self.progress(f"{stage.name}, {split}", number + 1, len(ks), f"k {k}")
        return {
            "scale": scale,
            "first_stage": first_stage(scores)[0],
            "curves": curves,
            "made_from": stage.made_from,
        }

    def _draw(self, record: Record, split: str) -> None:
        figure = rerank_figure(record)
        for suffix, content in {"svg": svg_text(figure).encode(), "png": png_bytes(figure)}.items():
            self.run.write_file(f"rerank-{split}.{suffix}", content)
