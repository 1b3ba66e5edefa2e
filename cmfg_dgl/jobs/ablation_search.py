"""`cmfg ablate --search`: the settings with the best validation rsum, by Optuna's TPE, with every trial kept."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from cmfg_dgl.config import Config
from cmfg_dgl.errors import CheckpointError, CmfgError, ConfigError
from cmfg_dgl.experiments.ablation.cells import choose_on_validation, trained
from cmfg_dgl.experiments.ablation.variants import Recipe, parse_sweep
from cmfg_dgl.experiments.bench.data import BenchData, same_features
from cmfg_dgl.experiments.cache import digest_of
from cmfg_dgl.files import to_json
from cmfg_dgl.jobs.ablate import identity_of
from cmfg_dgl.ownership import ABLATION, claim, refuse_foreign, write_owned, writing

__all__ = ["Axis", "parse_space", "search"]

_log = logging.getLogger(__name__)

Record = dict[str, Any]
Progress = Callable[..., None]
RANGE = re.compile(r"(?P<low>[^,]+)\.\.(?P<high>[^,:]+)(?P<log>:log)?")


@dataclass(frozen=True)
class Axis:
    """A key and where its value is looked for: in a range, both ends included, or among choices.

    Parameters
    ----------
    low, high
        Two whole numbers make a range of whole numbers.
    log
        Whether equal ratios, not equal differences, are equally likely at first.
    choices
        Values as they stand in an override.
    """

    key: str
    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[str, ...] = ()

    def suggest(self, trial: Trial) -> str:
        """The override of a trial."""
        if self.choices:
            return f"{self.key}={trial.suggest_categorical(self.key, self.choices)}"
        if isinstance(self.low, int) and isinstance(self.high, int):
            return f"{self.key}={trial.suggest_int(self.key, self.low, self.high, log=self.log)}"
        return f"{self.key}={trial.suggest_float(self.key, self.low, self.high, log=self.log)!r}"


def parse_space(recipe: Recipe, sweeps: Sequence[str]) -> list[Axis]:
    """The space of a search: `KEY=LOW..HIGH`, `KEY=LOW..HIGH:log` or `KEY=VALUE,VALUE` for each key.

    Raises
    ------
    ConfigError
        If one is not of that form, a key comes twice, or the recipe does not take one of the values named.
    """
    axes: list[Axis] = []
    for given in sweeps:
        key, values = parse_sweep(given)
        if key in [axis.key for axis in axes]:
            raise ConfigError(f"--sweep {key}: comes twice; give all its values at once")
        found = RANGE.fullmatch(values.strip())
        axis = _range(given, key, found) if found else Axis(key, choices=_choices(given, values))
        for value in axis.choices or (axis.low, axis.high):
            recipe.config(f"{key}={value}")
        axes.append(axis)
    if not axes:
        raise ConfigError("--search: say where to search with --sweep, as in model.dropout=0..0.5")
    return axes


def _range(given: str, key: str, found: re.Match[str]) -> Axis:
    ends: list[float] = []
    for text in (found["low"], found["high"]):
        try:
            ends.append(int(text) if text.strip().lstrip("+-").isdecimal() else float(text))
        except ValueError:
            raise ConfigError(f"--sweep {given!r}: {text!r} is no number; write KEY=LOW..HIGH") from None
    low, high = ends
    if not (np.isfinite(ends).all() and low < high):
        raise ConfigError(f"--sweep {given!r}: LOW must be below HIGH, and both finite")
    if found["log"] and low <= 0:
        raise ConfigError(f"--sweep {given!r}: a logarithmic range begins above 0")
    return Axis(key, low, high, bool(found["log"]))


def _choices(given: str, values: str) -> tuple[str, ...]:
    choices = tuple(dict.fromkeys(value.strip() for value in values.split(",")))
    if not all(choices):
        raise ConfigError(f"--sweep {given!r}: an empty value; write KEY=VALUE,VALUE")
    return choices


def search(
    recipe: Recipe, axes: Sequence[Axis], trials: int, seeds: Sequence[int], folder: Path, *, progress: Progress
) -> Record:
    """Try settings until so many trials are finished; started again it goes on where it was.

    The value of a trial is its two-stage rsum on the validation split, mean over the seeds; the test split is not
    read. Trials are suggested by TPE (Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization"), each
    from the finished ones and its own number alone, so that a search that was stopped ends as one that was not.

    Parameters
    ----------
    folder
        Gets `search.db`, Optuna's SQLite storage (study `cmfg`), and `search.json`.

    Returns
    -------
    dict
        The content of `search.json`: {"metric", "split", "protocol", "seeds", "space", "trials": [{"number",
        "value", "overrides", "failed"}], "best", "command"}, trials in order; one that cannot be trained has no
        value and says why in `failed`.

    Raises
    ------
    ConfigError
        If the folder holds a search of other data or settings, no trial could be trained, another process writes
        there, or a file that would be replaced is not cmfg's.
    CheckpointError
        If `search.db` is damaged.
    """
    with writing(folder, "cmfg ablate --search", ABLATION):
        refuse_foreign(folder, ("search.db", "search.json"))
        return _search(recipe, axes, trials, seeds, folder, progress)


def _search(
    recipe: Recipe, axes: Sequence[Axis], trials: int, seeds: Sequence[int], folder: Path, progress: Progress
) -> Record:
    data = BenchData.prepare(recipe.config(), progress)
    made_from = {
        "seeds": list(seeds),
        "space": [vars(axis) for axis in axes],
        **identity_of(data, recipe.config(), ("train", "val")),
    }
    claim(folder, ["search.db"], kind=ABLATION)
    study = _study(folder, digest_of(made_from))
    while (number := len(finished := _finished(study))) < trials:
        # Of its own number, not of how often the search was started.
        study.sampler = optuna.samplers.TPESampler(seed=number)
        _run_trial(study, data, recipe, axes, seeds)
        finished = _finished(study)
        best = max((t.value for t in finished if t.value is not None), default=float("nan"))
        progress("search", number + 1, trials, f"best {best:.1f} on validation")
    record = {
        "metric": "rsum",
        "split": "val",
        "protocol": data.experiment.dataset.protocol("val"),
        "seeds": list(seeds),
        "space": [vars(axis) for axis in axes],
        **_summary(recipe, finished),
    }
    write_owned(folder, "search.json", (to_json(record) + "\n").encode())
    return record


def _study(folder: Path, digest: str) -> optuna.Study:
    """The study of a folder, begun or found again; trials that a kill cut short are closed as failed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / "search.db"
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{path}", study_name="cmfg", direction="maximize", load_if_exists=True
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: damaged ({reason}); delete it to search anew") from None
    if study.user_attrs.get("made_from", digest) != digest:
        raise ConfigError(f"{path}: a search of other data or settings; choose another -o, or delete it")
    study.set_user_attr("made_from", digest)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials with a value, and those that cannot be trained, in order."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state == TrialState.COMPLETE or "failed" in t.user_attrs]


def _run_trial(
    study: optuna.Study, data: BenchData, recipe: Recipe, axes: Sequence[Axis], seeds: Sequence[int]
) -> None:
    trial = study.ask()
    overrides = [axis.suggest(trial) for axis in axes]
    trial.set_user_attr("overrides", overrides)
    try:
        config = recipe.config(*overrides)
        here = data if same_features(config, data.config) else BenchData.prepare(config, None)
        value = float(np.mean([_value(here, config, seed) for seed in seeds]))
    except CmfgError as error:
        _log.warning("trial %d, %s: %s", trial.number, " ".join(overrides), error)
        trial.set_user_attr("failed", str(error))
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, value)


def _value(data: BenchData, config: Config, seed: int) -> float:
    return choose_on_validation(trained(data, config, seed), data, config)[1]


def _summary(recipe: Recipe, finished: Sequence[FrozenTrial]) -> Mapping[str, Any]:
    rows: list[Record] = [
        {
            "number": number,
            "value": trial.value,
            "overrides": list(trial.user_attrs["overrides"]),
            "failed": trial.user_attrs.get("failed"),
        }
        for number, trial in enumerate(finished)
    ]
    able = [row for row in rows if row["value"] is not None]
    if not able:
        raise ConfigError(f"--search: none of {len(rows)} trials could be trained: {rows[-1]['failed']}")
    best = max(able, key=lambda row: float(row["value"]))
    named = [] if recipe.source is None else ["-c", recipe.source]
    command = shlex.join(["cmfg", "train", *named, *recipe.overrides, *best["overrides"]])
    return {"trials": rows, "best": best, "command": command}
