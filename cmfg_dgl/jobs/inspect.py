"""The job behind `cmfg inspect`: find the pair, in the data or from outside, and write what its attention shows."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from cmfg_dgl.data.dataset import Dataset, ImageItem, Split
from cmfg_dgl.data.formats.scenes import scene_of
from cmfg_dgl.errors import ConfigError, DataError
from cmfg_dgl.explain.faithfulness import Faithfulness, faithfulness_of_pairs, measure_faithfulness
from cmfg_dgl.explain.inspect import Pair, inspect_pair, write_attention
from cmfg_dgl.explain.pointing import NamedObject, Pointing, pointing_of_pair, pointing_of_pairs
from cmfg_dgl.features.stores import Progress
from cmfg_dgl.files import sha256_bytes
from cmfg_dgl.matcher import Matcher
from cmfg_dgl.nn.joint_attention import joint_attention
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.ownership import INSPECTION, claim, owned_files, refuse_foreign, remove_owned, writing
from cmfg_dgl.reporting.inspect_page import write_inspection
from cmfg_dgl.reporting.overlays import write_overlays
from cmfg_dgl.retrieval.scorer import candidates, fuse
from cmfg_dgl.training.experiment import Experiment, build_model
from cmfg_dgl.training.run_directory import Run, hold_run

__all__ = ["inspect_file", "inspect_item", "inspect_query", "inspect_split"]

COMMAND = "cmfg inspect"
PAGE = "inspect.html"
WRITTEN = (PAGE, "attention.json", "attention.safetensors", "edges.png")
"""Files of an inspection, the pictures of its tokens aside."""


def inspect_file(
    run: Run, image: Path, text: str, *, output: Path | None, force: bool, faithfulness: bool
) -> dict[str, Any]:
    """Inspect a picture from anywhere with a caption of one's own, by the encoders of the run.

    Parameters
    ----------
    output
        The folder to write; None for `RUN/inspect/` and a name of the picture and a digest of both.
    force
        Replace what is there.
    faithfulness
        Measure whether the score follows the attention.

    Returns
    -------
    dict
        What `cmfg inspect --json` prints.

    Raises
    ------
    DataError
        If the picture cannot be read, or nothing of the caption.
    ConfigError
        If something is there that may not be overwritten, or another process writes there.
    """
    with _held(run, output):
        models = _models(run, faithfulness)
        pair = models.matcher.pair(image, text)
        digest = sha256_bytes(pair.picture.tobytes() + text.encode())[:8]
        folder = output or run.folder / "inspect" / f"{_slug(image.stem)}-{digest}"
        return _write(models, pair, folder, force)


def inspect_item(
    run: Run, item: str, *, output: Path | None, force: bool, faithfulness: bool, progress: Progress
) -> dict[str, Any]:
    """Inspect a pair of the run's data set: a caption with its image, or an image with its first caption.

    Parameters
    ----------
    item
        The id of either.

    Raises
    ------
    DataError
        If there is no such id, or the item cannot be used.
    """
    with _held(run, output):
        source = _Source.open(run, faithfulness, progress)
        caption = source.caption(item)
        folder = output or run.folder / "inspect" / _slug(item)
        pair = source.pair(source.experiment.dataset.captions[caption].image, caption)
        return _write(source.models, pair, folder, force)


def inspect_query(
    run: Run, item: str, *, top: int, output: Path | None, force: bool, faithfulness: bool, progress: Progress
) -> dict[str, Any]:
    """Retrieve for an image or a caption of the data set, from its own split, and inspect the best results.

    Both stages run, with the alpha of the run. Each result has its own folder, named by its rank.

    Parameters
    ----------
    item
        The id of an image or of a caption.
    top
        How many results.

    Returns
    -------
    dict
        {"query", "direction", "split", "results"}; of each result its rank, ids, whether it is right, the final
        score, and what `inspect_item` returns.

    Raises
    ------
    DataError
        If there is no such id, or the split is not whole.
    """
    with _held(run, output):
        source = _Source.open(run, faithfulness, progress)
        dataset = source.experiment.dataset
        direction, split, query = source.query(item)
        best, scores = _retrieve(run, source, split, direction, query, top, progress)
        folder = output or run.folder / "inspect" / _slug(item)
        results = []
        for rank, (found, score) in enumerate(zip(best.tolist(), scores.tolist(), strict=True), start=1):
            left, right = (query, found) if direction == "i2t" else (found, query)
            image, caption = int(split.images[left]), int(split.captions[right])
            results.append(
                {
                    "rank": rank,
                    "image": dataset.images[image].id,
                    "caption": dataset.captions[caption].id,
                    "text": dataset.captions[caption].text,
                    "correct": bool(split.caption_image[right] == left),
                    "final_score": score,
                    **_write(source.models, source.pair(image, caption), folder / str(rank), force),
                }
            )
    return {"query": item, "direction": direction, "split": split.name, "results": results}


def inspect_split(run: Run, split: str, *, pairs: int, force: bool, progress: Progress) -> dict[str, Any]:
    """Ask of many pairs of a split, evenly spread over it, whether the score follows the attention.

    Where the data set knows the boxes of what captions name (`scenes`), also whether words point at their objects.

    Parameters
    ----------
    pairs
        How many matching pairs; all, if there are fewer.

    Returns
    -------
    dict
        What `RUN/faithfulness-SPLIT.json` holds.

    Raises
    ------
    ConfigError
        If it is there already and may not be overwritten, or the model has no relation from patches to tokens.
    """
    path = run.folder / f"faithfulness-{split}.json"
    if path.exists() and not force:
        raise ConfigError(f"{path}: is there already; add --force to replace it")
    with hold_run(run, COMMAND):
        return _inspect_split(run, split, pairs, progress)


def _inspect_split(run: Run, split: str, pairs: int, progress: Progress) -> dict[str, Any]:
    source = _Source.open(run, True, progress)
    dataset, view = source.experiment.dataset, source.experiment.evaluation_split(split)
    chosen = np.unique(np.linspace(0, len(view.captions) - 1, pairs).round().astype(np.int64))
    curves: list[Faithfulness] = []
    pointed: dict[str, list[list[Pointing]]] = {}
    for done, caption in enumerate(view.captions[chosen].tolist()):
        image = dataset.captions[caption].image
        pair = source.pair(image, caption)
        nodes = source.models.trained.to_device(pair.image), source.models.trained.to_device(pair.caption)
        found = measure_faithfulness(source.models.trained, cast(CMFG, source.models.untrained), *nodes)
        if found is None:
            raise ConfigError(f"{run.folder}: no relation leads from patches to tokens, so nothing ranks patches")
        curves.append(found)
        if pair.objects:
            model = source.models.trained
            weights = joint_attention(model, *nodes).relations
            points = pointing_of_pair(weights, pair.spans, pair.boxes, pair.objects, joint=model.joint)
            for name, objects in points.items():
                pointed.setdefault(name, []).append(objects)
        progress("pairs", done + 1, len(chosen))
    record = {
        "dataset": dataset.name,
        "split": split,
        "protocol": dataset.protocol(split),
        "pairs": len(chosen),
        **faithfulness_of_pairs(curves),
        **({"pointing": {name: pointing_of_pairs(pairs) for name, pairs in pointed.items()}} if pointed else {}),
    }
    run.write(f"faithfulness-{split}.json", record)
    return record


class _Models(NamedTuple):
    """A trained run, and where faithfulness is measured its model with random weights in its graph layers."""

    matcher: Matcher
    untrained: CMFG | None

    @property
    def trained(self) -> CMFG:
        return self.matcher.graph_model


@dataclass(frozen=True)
class _Source:
    """A trained run with its data set: where pairs come from."""

    experiment: Experiment
    models: _Models

    @classmethod
    def open(cls, run: Run, faithfulness: bool, progress: Progress) -> _Source:
        models = _models(run, faithfulness)
        # Before any work: where patches lie is not known of every encoder.
        models.matcher.vision.view(1, 1)
        return cls(Experiment.prepare(run.config, progress), models)

    @property
    def _dataset(self) -> Dataset:
        return self.experiment.dataset

    def caption(self, item: str) -> int:
        """Position of the caption with this id, or of the first caption of the image with it."""
        for position, caption in enumerate(self._dataset.captions):
            if item in (caption.id, self._dataset.images[caption.image].id):
                return position
        raise _unknown(self._dataset, item)

    def query(self, item: str) -> tuple[str, Split, int]:
        """Direction of a query, its split, and its place there; an id of both kinds is the image's."""
        for name in self._dataset.splits:
            view = self._dataset.split(name)
            images = [self._dataset.images[i].id for i in view.images]
            captions = [self._dataset.captions[c].id for c in view.captions]
            for direction, ids in (("i2t", images), ("t2i", captions)):
                if item in ids:
                    return direction, self.experiment.evaluation_split(name), ids.index(item)
        raise _unknown(self._dataset, item)

    @torch.no_grad()
    def pair(self, image: int, caption: int) -> Pair:
        """An image with a caption, by their positions in the data set; their nodes are those that are evaluated."""
        experiment, item = self.experiment, self._dataset.images[image]
        text = self._dataset.captions[caption]
        for store, name in ((experiment.images, item.id), (experiment.captions, text.id)):
            if name in store.quarantined:
                raise DataError(f"{self._dataset.name}: {store.quarantined[name]}; choose another pair")
        images = experiment.items("image", torch.tensor([image]))
        captions = experiment.items("text", torch.tensor([caption]))
        encoders, first = self.models.trained.encoders, torch.tensor([0])
        picture, tokenised = self._dataset.load(item), self.models.matcher.text.prepare(text.text)
        return Pair(
            name=item.id,
            picture=picture,
            view=self.models.matcher.vision.view(*picture.size),
            text=text.text,
            spans=tuple((int(a), int(b)) for a, b in experiment.captions.spans([text.id])),
            words=tuple(tokenised.words[tokenised.kept].tolist()),
            image=encoders.read(images, first),
            caption=encoders.read(captions, first),
            objects=self._objects(item, matching=text.image == image),
        )

    def _objects(self, item: ImageItem, matching: bool) -> tuple[NamedObject, ...]:
        """What the caption of a scene names and where it lies; nothing of other data or of another caption."""
        if self._dataset.name != "scenes" or not matching:
            return ()
        scene = scene_of(item)
        return tuple(NamedObject(start, end, scene.objects[index].box) for start, end, index in scene.spans)


def _retrieve(
    run: Run, source: _Source, split: Split, direction: str, query: int, top: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Places in the gallery of the best results of both stages, and their final scores."""
    matcher = source.models.matcher
    scorer = matcher.make_scorer(progress)
    pair_dataset = source.experiment.pair_dataset(split)
    sides = scorer.embeddings(pair_dataset)
    queries, gallery = sides if direction == "i2t" else sides[::-1]
    mine = queries[query : query + 1]
    chosen = candidates(mine, gallery, run.config.retrieval.k)
    ends = (torch.full_like(chosen[0], query), chosen[0])
    joint = scorer.pairs(pair_dataset, *(ends if direction == "i2t" else ends[::-1]))
    final = fuse(mine @ gallery.T, chosen, joint[None], matcher.alpha)[0]
    best = final.topk(min(top, len(final)))
    return best.indices, best.values


def _held(run: Run, output: Path | None) -> AbstractContextManager[None]:
    """The right to write an inspection: to the run, or to the folder that was asked for."""
    return hold_run(run, COMMAND) if output is None else writing(output, COMMAND, INSPECTION)


def _models(run: Run, faithfulness: bool) -> _Models:
    matcher = Matcher.of_run(run)
    if not faithfulness:
        return _Models(matcher, None)
    # Features enter as they do in training, for without that nothing would be left to attend to.
    untrained = copy.deepcopy(matcher.graph_model)
    widths = {"patch": matcher.vision.width, "token": matcher.text.width}
    other = build_model(run.config, widths, run.config.run.seed + 1)
    untrained.layers.load_state_dict(other.layers.state_dict())
    if untrained.reasoning is not None and other.reasoning is not None:
        untrained.reasoning.layer.load_state_dict(other.reasoning.layer.state_dict())
    return _Models(matcher, untrained)


def _write(models: _Models, pair: Pair, folder: Path, force: bool) -> dict[str, Any]:
    """Inspect a pair and write all of it into a folder of its own."""
    owned = owned_files(folder)
    # The page is written last: without it a kill came between, and there is nothing to lose.
    if PAGE in owned and (folder / PAGE).exists() and not force:
        raise ConfigError(f"{folder}: holds an inspection; add --force to replace it, or choose another -o")
    refuse_foreign(folder, (*WRITTEN, *owned))
    inspection = inspect_pair(models.trained, pair, untrained=models.untrained)
    remove_owned(folder)
    claim(folder, kind=INSPECTION)
    files = [*write_attention(inspection, folder), *write_overlays(inspection, folder)]
    return inspection.record([write_inspection(inspection, folder), *files])


def _unknown(dataset: Dataset, item: str) -> DataError:
    some: Sequence[str] = [dataset.images[0].id, dataset.captions[0].id]
    return DataError(
        f"{dataset.name}: no image or caption {item!r}; ids look like {' and '.join(map(repr, some))}, see "
        "manifest-train.json"
    )


def _slug(name: str) -> str:
    """A name that is fit for a folder: letters, digits, dots and hyphens, a digest where others were left out."""
    short = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:60]
    return short if short == name else f"{short}-{sha256_bytes(name.encode())[:8]}".lstrip("-")
