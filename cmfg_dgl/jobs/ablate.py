"""`cmfg ablate`: every cell once, then `ablation.json` and what people read of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cmfg_dgl.config import Config, RunConfig, to_yaml
from cmfg_dgl.experiments.ablation.cells import cut_down, evaluated, trained
from cmfg_dgl.experiments.ablation.results import collect
from cmfg_dgl.experiments.ablation.variants import Variant
from cmfg_dgl.experiments.bench.data import BenchData, same_features
from cmfg_dgl.experiments.cache import CellFile, cell_settings, digest_of
from cmfg_dgl.files import sha256_bytes, to_json
from cmfg_dgl.ownership import ABLATION, claim, refuse_foreign, remove_owned, write_all_owned, writing
from cmfg_dgl.reporting.ablation_pages import write_outputs
from cmfg_dgl.training.checkpoint import save_checkpoint

__all__ = ["Plan", "ablate", "identity_of"]

Record = dict[str, Any]
Progress = Callable[..., None]

PAGES = ("ablation.md", "ablation.svg", "ablation.png", "ablation.html")
WRITTEN = ("config.yaml", "ablation.json", *PAGES)
"""Files of an ablation, its cells and weights aside."""


@dataclass(frozen=True)
class Plan:
    """What an ablation runs and how it is judged.

    Parameters
    ----------
    baseline, variants
        What is compared with what.
    seeds
        Each variant has a cell for each.
    metric, stage, split
        `rsum` or `R@1`; `first_stage` or `two_stage`; `val` or `test`.
    """

    baseline: Variant
    variants: Sequence[Variant]
    seeds: Sequence[int]
    metric: str
    stage: str
    split: str

    def cells(self) -> list[tuple[Variant, int]]:
        """Every cell, the baseline's first; a change that leaves the configuration as it is has none of its own."""
        changing = [variant for variant in self.variants if not self.changes_nothing(variant)]
        return [(variant, seed) for variant in (self.baseline, *changing) for seed in self.seeds]

    def changes_nothing(self, variant: Variant) -> bool:
        """Whether a variant is the baseline itself, as when a sweep holds the value that the recipe has."""
        same = not variant.dropped and variant.config == self.baseline.config
        return same and variant.mode != "shuffle"


def ablate(plan: Plan, folder: Path, *, force: bool, progress: Progress) -> Record:
    """Run what is missing of an ablation and write its results; finished cells are not repeated.

    Parameters
    ----------
    folder
        Gets a file for each cell, `weights/` of the baseline, and at the end `config.yaml`, `ablation.json`,
        `ablation.md`, `ablation.html` and the picture as SVG and PNG.
    force
        Run every cell again.
    progress
        Called with (what, done, total, message).

    Returns
    -------
    dict
        The content of `ablation.json`.

    Raises
    ------
    ConfigError
        If a finished cell was made from other data or settings, another process writes there, or a file that would
        be replaced is not cmfg's.
    CheckpointError
        If a cell or the weights of the baseline are damaged.
    """
    with writing(folder, "cmfg ablate", ABLATION):
        refuse_foreign(folder, WRITTEN)
        return _ablate(plan, folder, force, progress)


def _ablate(plan: Plan, folder: Path, force: bool, progress: Progress) -> Record:
    runner = _Runner(plan, folder, force, progress)
    if force:
        # Data and features first, for they may be at fault. Results must be of the cells that lie beside them.
        runner.data(plan.baseline.config)
        remove_owned(folder, WRITTEN)
    cells: dict[Variant, list[Record]] = {}
    planned = plan.cells()
    for done, (variant, seed) in enumerate(planned):
        record = runner.cell(variant, seed)
        cells.setdefault(variant, []).append(record)
        message = f"{variant.change} seed {seed}: {record['val_rsum']:.1f} on validation"
        progress("ablation", done + 1, len(planned), message)
    data = runner.data(plan.baseline.config)
    split = (data.val if plan.split == "val" else data.test).split
    baseline = cells[plan.baseline]
    results = {
        "dataset": data.experiment.dataset.name,
        "split": plan.split,
        "protocol": data.experiment.dataset.protocol(plan.split),
        "n_images": len(split.images),
        "n_captions": len(split.captions),
        "metric": plan.metric,
        "stage": plan.stage,
        "seeds": list(plan.seeds),
        **collect(
            baseline,
            [(variant, cells.get(variant, baseline)) for variant in plan.variants],
            metric=plan.metric,
            stage=plan.stage,
            caption_image=split.caption_image,
        ),
    }
    # A baseline has no run directory.
    config = replace(plan.baseline.config, run=replace(plan.baseline.config.run, output_dir=RunConfig().output_dir))
    contents = {"config.yaml": to_yaml(config), "ablation.json": to_json(results) + "\n"}
    write_all_owned(folder, {name: text.encode() for name, text in contents.items()})
    write_outputs(results, folder)
    return results


@dataclass
class _Runner:
    """The cells of an ablation and the data that they share."""

    plan: Plan
    folder: Path
    force: bool
    progress: Progress
    prepared: list[BenchData] = field(default_factory=list)

    def data(self, config: Config) -> BenchData:
        """Data and features of a configuration; only features may differ between variants."""
        for data in self.prepared:
            if same_features(config, data.config):
                return data
        evaluated = ("test",) if self.plan.split == "test" else ()
        self.prepared.append(BenchData.prepare(config, self.progress, evaluated=evaluated))
        return self.prepared[-1]

    def cell(self, variant: Variant, seed: int) -> Record:
        """A cell from its file, or run now."""
        config, base = variant.config, variant is self.plan.baseline
        data = self.data(config)
        kind = "" if base else variant.mode
        parts = ("cells", kind, _file_name(variant.change), f"seed-{seed}.json")
        file = CellFile(self.folder, "/".join(part for part in parts if part))
        name = f"weights/seed-{seed}.safetensors"
        weights = self.folder / name
        digest = digest_of(
            {
                "seed": seed,
                "dropped": list(variant.dropped),
                "split": self.plan.split,
                **identity_of(data, config, ("train", "val", self.plan.split)),
            }
        )
        kept = file.read(digest, force=self.force)
        if kept is not None and (not base or weights.is_file()):
            return kept
        if base:
            refuse_foreign(self.folder, [file.name, name])
        claim(self.folder, [name] * base, kind=ABLATION)
        if variant.mode == "retrain":
            model = trained(data, config, seed)
        else:
            model = cut_down(data, config, weights, variant.dropped)
        record = {"change": variant.change, "mode": variant.mode, "seed": seed, "made_from": digest}
        record |= evaluated(model, data, config, self.plan.split, shuffled=variant.mode == "shuffle")
        if base:
            # Before the cell, which says that both are there.
            save_checkpoint(weights, model.state_dict(), {"seed": seed, "made_from": digest})
        file.write(record)
        return record


def identity_of(data: BenchData, config: Config, splits: Sequence[str]) -> Mapping[str, Any]:
    """Everything that a cell depends on, beside its seed: items, features and settings, less where it runs."""
    return {**data.identity(dict.fromkeys(splits)), "recipe": asdict(cell_settings(config))}


def _file_name(change: str) -> str:
    """A change as the name of a folder; what a file system may not take is told apart by a digest."""
    plain = re.sub(r"[^\w.=+-]", "-", change)[:80]
    return plain if plain == change.replace(" ", "-") else f"{plain}-{sha256_bytes(change.encode())[:8]}"
