"""What the JSON files that pages are made of must hold; a file that does not is refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic import model_validator as validator

from cmfg_dgl.errors import CheckpointError

__all__ = [
    "AUDIT",
    "BENCH_EXAMPLES",
    "BENCH_RESULTS",
    "CURVES",
    "EPOCH",
    "EVALUATION",
    "EXAMPLES",
    "OBJECT",
    "SELECTION",
    "TRAINING",
    "checked",
]

NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
PICTURE = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}")

Number = float | None  # null where it is not finite
# A method's name becomes the name of a file.
Name = Annotated[str, StringConstraints(pattern=NAME)]
Stage = Literal["first_stage", "two_stage"]
Correction = Literal["none", "hubness", "csls"]
T = TypeVar("T")


class Record(BaseModel):
    """A JSON object: no number is made of a text or of true; keys that no page shows may stand beside."""

    model_config = ConfigDict(strict=True)


class Ways(Record, Generic[T]):
    """One thing for each direction."""

    i2t: T
    t2i: T


class Mean(Record):
    """A mean over seeds, and its interval, where there is more than one."""

    mean: Number
    lo: Number = None
    hi: Number = None


class Choice(Record):
    """What validation chose with each seed, and the mean."""

    mean: Number
    chosen: list[Number] = []


class Tests(Record):
    """The tests of a row against CMFG."""

    difference: Number
    lo: Number
    hi: Number
    p_queries: Number
    p_queries_holm: Number
    p_seeds: Number
    p_seeds_holm: Number


class Trial(Record):
    """A setting that was tried, and its value on validation."""

    setting: dict[str, Any]
    val: Number


class Curves(Record):
    """Points of the curves of one direction; a small gallery has fewer than ten of the CMC."""

    cmc: list[Number] = Field(max_length=10)
    precision_recall: list[Number] = Field(min_length=11, max_length=11)


class AtOne(Record):
    """The metric that stands beside that of the leaky protocol."""

    r_1: Mean = Field(alias="R@1")


class Instance(AtOne):
    """The metrics of one direction by instance relevance."""

    r_5: Mean = Field(alias="R@5")
    r_10: Mean = Field(alias="R@10")
    p_5: Mean = Field(alias="P@5")
    p_10: Mean = Field(alias="P@10")
    map_all: Mean = Field(alias="mAP@all")
    map_r: Mean = Field(alias="mAP@R")
    mrr: Mean = Field(alias="MRR")


class Labelled(Record):
    """The metrics of one direction by label relevance."""

    map_all: Mean = Field(alias="mAP@all")
    map_50: Mean = Field(alias="mAP@50")
    p_5: Mean = Field(alias="P@5")
    p_10: Mean = Field(alias="P@10")


class HonestRow(Record):
    """What the page of a leaky comparison reads of a row of the honest one."""

    method: Name
    stage: Stage
    correction: Correction
    judged_by: str
    rsum: Mean
    i2t: AtOne
    t2i: AtOne


class Row(HonestRow):
    """A method in a stage, with a correction."""

    i2t: Instance
    t2i: Instance
    seeds: list[int]
    label: Ways[Labelled] | None
    hard_negatives: dict[str, Mean] | None
    recall_at_k_bound: Ways[Number] | None
    k: Number
    alpha: Choice | None
    p_vs_cmfg: Number
    tests: Tests | None
    tests_of_two: Tests | None = None
    at_chance: bool = False
    train_seconds: Number
    pairs_per_second: Number
    parameters: Number
    peak_memory_mb: Number
    alignment: dict[str, Mean] | None
    attention: dict[str, dict[str, Number]] | None
    setting: dict[str, Any]
    search: list[Trial]
    timed_out: bool
    curves: Ways[Curves] | None


class Check(Record):
    """A check of an audit."""

    name: str
    passed: bool
    value: Number
    bound: Number
    explanation: str


class Checks(Record):
    """An audit of a compared method."""

    passed: bool
    checks: list[Check]


class LabelRelevance(Record):
    """What is right by label, and what chance gets."""

    labels: int
    chance: Number
    gallery: int = 0


class BenchResults(Record):
    """`results.json` of a comparison."""

    protocol: str
    dataset: str
    split: str
    leaky: bool
    n_images: int
    n_captions: int
    trials: int
    seeds: list[int]
    minutes: Number
    label_relevance: LabelRelevance | None
    chance_rsum: Number
    correction: Correction
    rows: list[Row]
    audits: dict[str, Checks]
    honest: list[HonestRow] = []

    @validator(mode="after")
    def no_row_twice(self) -> BenchResults:
        """Refuse a method that stands in a stage and a correction for the second time."""
        seen = set()
        for number, row in enumerate(self.rows):
            if (key := (row.method, row.stage, row.correction)) in seen:
                raise ValueError(f"rows[{number}] is {' '.join(key)} for the second time")
            seen.add(key)
        return self


class Item(Record):
    """An image or a text; any other address than that of an embedded picture would make the page load it."""

    image: str | None = None
    text: str | None = None

    @validator(mode="after")
    def shows_something(self) -> Item:
        """Refuse another address than that of an embedded picture, and an item of neither kind."""
        if self.image is not None and not PICTURE.fullmatch(self.image):
            raise ValueError("image is no embedded PNG, JPEG, WebP or GIF")
        if self.image is None and self.text is None:
            raise ValueError("is neither image nor text")
        return self


class Retrieved(Item):
    """An item that a query retrieved."""

    score: Number
    correct: bool


class Example(Record):
    """A query and what it retrieved."""

    direction: str
    query: Item
    results: list[Retrieved]


class Training(Record):
    """`training.json` of a run."""

    dataset: str
    protocol: str
    validation_protocol: str
    train_images: int
    train_captions: int
    val_images: int
    near_duplicates: int
    truncated_captions: int
    quarantined: dict[str, str]
    parameters: int
    seconds: Number
    published: bool = False


class Selection(Record):
    """`selection.json` of a run."""

    split: str
    protocol: str
    epoch: int
    k: int
    alpha: float
    alphas: list[float]
    rsums: list[Number]
    first_stage_rsum: Number
    two_stage_rsum: Number


class FirstStage(Ways[dict[str, Number]]):
    """The record of a stage: the metrics of both directions, and sums."""

    rsum: Number
    chance_rsum: Number


class TwoStage(FirstStage):
    """The record of both stages."""

    k: int
    alpha: float
    recall_at_k_bound: Ways[Number]


class Folds(Record):
    """Means over disjoint parts of a split."""

    folds: int
    n_images: int
    first_stage: FirstStage
    two_stage: FirstStage


class Gallery(Record):
    """What is searched by label."""

    splits: list[str]
    n_images: int


class ByLabel(Record):
    """Both stages under label relevance."""

    labels: int
    chance: Number
    gallery: Gallery
    first_stage: Ways[dict[str, Number]]
    two_stage: Ways[dict[str, Number]]


class HardNegatives(Record):
    """How often the right caption beats false ones of its very words, by what was exchanged, in both stages."""

    first_stage: dict[str, Number]
    two_stage: dict[str, Number]


class Evaluation(Record):
    """`evaluation-SPLIT.json` of a run."""

    split: str
    protocol: str
    n_images: int
    n_captions: int
    first_stage: FirstStage
    two_stage: TwoStage
    pairs_per_second: Number
    seconds: Number
    folds: Folds | None = None
    label: ByLabel | None = None
    hard_negatives: HardNegatives | None = None


class Verdict(Record):
    """A check of a run's audit, whose verdict is read as it stands: what is not true has failed."""

    name: str
    passed: Any
    value: Number
    bound: Number
    explanation: str


class RunAudit(Record):
    """`audit.json` of a run."""

    protocol: str
    passed: Any
    checks: list[Verdict]


class CMCPoints(Record):
    """A curve of the CMC."""

    k: list[Number]
    value: list[Number]


class PrecisionRecallPoints(Record):
    """A curve of precision against recall."""

    recall: list[Number]
    precision: list[Number]


class RunCurves(Record):
    """`curves-SPLIT.json` of a run: the points of each curve by its name."""

    cmc: dict[str, CMCPoints]
    precision_recall: dict[str, PrecisionRecallPoints]


OBJECT: TypeAdapter[Any] = TypeAdapter(dict[str, Any])
EPOCH: TypeAdapter[Any] = TypeAdapter(dict[str, Number])
TRAINING: TypeAdapter[Any] = TypeAdapter(Training)
SELECTION: TypeAdapter[Any] = TypeAdapter(Selection)
EVALUATION: TypeAdapter[Any] = TypeAdapter(Evaluation)
CURVES: TypeAdapter[Any] = TypeAdapter(RunCurves)
EXAMPLES: TypeAdapter[Any] = TypeAdapter(list[Example])
AUDIT: TypeAdapter[Any] = TypeAdapter(RunAudit)
BENCH_RESULTS: TypeAdapter[Any] = TypeAdapter(BenchResults)
BENCH_EXAMPLES: TypeAdapter[Any] = TypeAdapter(dict[Name, list[Example]])

KINDS = {
    "float_type": "no number",
    "int_type": "no whole number",
    "bool_type": "no bool",
    "string_type": "no text",
    "list_type": "no list",
    "dict_type": "no object",
    "model_type": "no object",
    "string_pattern_mismatch": "no name of letters, digits, dots and hyphens",
}


def checked(value: Any, kind: TypeAdapter[Any], path: Path, remedy: str) -> Any:
    """The content of a JSON file, as it was read, if it is of this kind.

    Raises
    ------
    CheckpointError
        If it is not: names the file, the first key at which it fails, and the remedy.
    """
    try:
        kind.validate_python(value, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{path}: damaged ({_fault(error.errors()[0])}); {remedy}") from None
    return value


def _fault(error: Any) -> str:
    """The first failure in words: `has no key rows[0].rsum.mean`, `rows is no list`."""
    where = ""
    for part in error["loc"]:
        if part == "[key]":
            continue
        where += f"[{part}]" if isinstance(part, int) else f"{'.' * bool(where)}{part}"
    if error["type"] == "missing":
        return f"has no key {where}"
    if error["type"] == "value_error":
        return " ".join(filter(None, (where, str(error["ctx"]["error"]))))
    if error["type"] in ("too_short", "too_long"):
        return f"{where} has {error['ctx']['actual_length']} points"
    told = KINDS.get(error["type"])
    return f"{where or 'the file'} is {told}" if told else f"{where}: {error['msg']}"
