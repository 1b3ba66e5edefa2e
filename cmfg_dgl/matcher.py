"""A trained model as one object: it embeds, scores, ranks and explains pictures and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import dgl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cmfg_dgl.config import Config
from cmfg_dgl.config.text import absolute
from cmfg_dgl.data.images import IMAGE_SUFFIXES, read_image, to_rgb
from cmfg_dgl.errors import ConfigError
from cmfg_dgl.explain.inspect import Inspection, Pair, inspect_pair, write_attention
from cmfg_dgl.export import Parts, parts_of, parts_of_run, push_parts, save_parts
from cmfg_dgl.features.encoders.load import load_vision_inputs
from cmfg_dgl.features.encoders.text import TextEncoder
from cmfg_dgl.features.encoders.vision import VisionEncoder
from cmfg_dgl.features.nodes import Nodes, concatenate
from cmfg_dgl.features.pair_dataset import ItemSet, PairDataset
from cmfg_dgl.nn.model import CMFG
from cmfg_dgl.reporting.inspect_page import write_inspection
from cmfg_dgl.reporting.overlays import write_overlays
from cmfg_dgl.retrieval.aligned_scorer import AlignedScorer
from cmfg_dgl.retrieval.hubness import Correction, corrected, make_correction
from cmfg_dgl.retrieval.query_bank import QueryBank
from cmfg_dgl.retrieval.scorer import GraphScorer, Scorer, fused
from cmfg_dgl.retrieval.scorer import candidates as first_stage_candidates
from cmfg_dgl.training.experiment import read_pictures, read_texts
from cmfg_dgl.training.run_directory import Run

__all__ = ["Hit", "Matcher", "Picture"]

Picture: TypeAlias = str | Path | Image.Image | NDArray[Any]
"""A path, a PIL image, or an array of uint8: (H, W, 3), (H, W, 4) or (H, W)."""

Progress: TypeAlias = Callable[[int, int], object]


@dataclass(frozen=True)
class Hit:
    """One candidate that a query found.

    Parameters
    ----------
    index
        Position among the candidates.
    score
        Final score, by which hits are sorted: the fused score of both stages for a re-ranked hit, the first-stage
        score without re-ranking.
    first_stage_rank
        Rank in the first stage, from 1.
    joint_score
        Score of the pair in its joint graph; None without re-ranking.
    """

    index: int
    score: float
    first_stage_rank: int
    joint_score: float | None


@dataclass(frozen=True)
class Matcher:
    """A trained model with its encoders, hubness correction and settings.

    `Matcher.load` and `cmfg_dgl.train` make one. Methods compute without gradients, in evaluation mode. An aligned
    model such as CLIP is one without training: its first stage is the cosine of its vectors, and it has no graph.

    Parameters
    ----------
    config
        The configuration that the model was trained with.
    model
        The graph model, with the encoders that were tuned with it (`training.tune`); None for an aligned model as
        it is.
    vision, text
        The pretrained encoders.
    query_bank
        Query bank of the hubness correction; None where the configuration has no correction.
    alpha
        Weight of the joint score in the fused score, as validation chose it.
    provenance
        What the model was trained on, as values for JSON.
    """

    config: Config
    model: CMFG | None
    vision: VisionEncoder
    text: TextEncoder
    query_bank: QueryBank | None
    alpha: float
    provenance: Mapping[str, Any]

    @classmethod
    def load(cls, source: str | Path, device: str = "cpu") -> Matcher:
        """Read a trained model.

        Parameters
        ----------
        source
            A run directory of `cmfg train`, a folder that `save` or `cmfg export` wrote, the folder of an aligned
            model of transformers (CLIP, SigLIP), or the name of a repository on the Hugging Face hub (OWNER/NAME)
            that holds such a folder or such a model.
        device
            Torch device of the model and the encoders.

        Raises
        ------
        CheckpointError
            If there is no trained model, a file of it is damaged, or an encoder differs from the one it was trained
            with.
        ConfigError
            If the device or an encoder cannot be had, or an aligned model is incomplete.
        """
        return cls(*parts_of(source, device))

    @classmethod
    def of_run(cls, run: Run) -> Matcher:
        """The trained model of a run directory, with the overrides and on the device of its configuration.

        Raises
        ------
        CheckpointError
            If the training is not finished, or a file of the run is damaged.
        """
        return cls(*parts_of_run(run))

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write a folder that `load` reads on any machine with the same encoders, without the training data.

        It holds the weights, the query bank, the configuration, names and digests of the encoders, and a model
        card.

        Parameters
        ----------
        folder
            A new or empty folder.
        force
            Replace an exported model in that folder.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        ConfigError
            If the folder holds something else, or an exported model whose model card somebody changed, or an
            exported model and `force` is False.
        """
        return save_parts(self._parts, Path(folder), force=force)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload what `save` writes to a model repository of the Hugging Face hub, made if it is missing.

        Returns
        -------
        str
            Address of the commit.
        """
        return push_parts(self._parts, repo_id, private=private, token=token)

    def embed_images(
        self, images: Sequence[Picture], batch_size: int = 32, progress: Progress | None = None
    ) -> Tensor:
        """First-stage embeddings of pictures, float32 (N, D) on the host.

        The inner product of the embeddings of an image and a text is their first-stage score.

        Parameters
        ----------
        images
            Paths, PIL images or arrays.
        batch_size
            Pictures that the encoder reads at a time.
        progress
            Called with (done, total).

        Raises
        ------
        DataError
            If a picture cannot be read.
        """
        return self._embed("image", images, batch_size, progress)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 32, progress: Progress | None = None) -> Tensor:
        """First-stage embeddings of texts, float32 (N, D) on the host; parameters as for `embed_images`.

        Each distinct text is encoded once, and progress counts these.

        Raises
        ------
        DataError
            If no token of a text is known to the encoder.
        """
        # Equal texts get equal embeddings, whatever their batches.
        distinct, which = _distinct(texts)
        return self._embed("text", distinct, batch_size, progress)[which]

    def score_pairs(self, images: Sequence[Picture], texts: Sequence[str]) -> Tensor:
        """Joint scores of pairs, float32 (N,): image i with text i, each pair in a graph of its own.

        Raises
        ------
        ValueError
            If there are not as many images as texts.
        DataError
            If a picture or a text cannot be used.
        ConfigError
            If there is no trained joint stage.
        """
        if len(images) != len(texts):
            raise ValueError(f"score_pairs: {len(images)} images and {len(texts)} texts; give a text an image")
        scorer = self.graph_scorer()
        if not images:
            return torch.zeros(0)
        pairs = self._pair_dataset(images, texts)
        return scorer.pairs(pairs, torch.arange(len(images)), torch.arange(len(texts)))

    def rank(
        self, queries: Sequence[Picture], candidates: Sequence[Picture], k: int = 10, rerank: bool = True
    ) -> list[list[Hit]]:
        """The best candidates of each query: texts for pictures, or pictures for texts.

        The first stage finds `retrieval.k` candidates of each query, at least k. The second stage re-ranks these by
        the fused score, with the weight that validation chose. An aligned model as it is has no second stage, and
        the `joint_score` of its hits is None.

        Parameters
        ----------
        queries, candidates
            Pictures and texts, or texts and pictures. A string that names an existing picture file is a picture;
            any other string is a text.
        k
            Hits of each query; fewer where there are fewer candidates.
        rerank
            False for the first stage alone.

        Returns
        -------
        list of list of Hit
            For each query its hits, best first.

        Raises
        ------
        ValueError
            If queries and candidates are of the same modality, or k is less than 1.
        DataError
            If a picture or a text cannot be used.
        """
        if k < 1:
            raise ValueError(f"rank: k is {k}; give at least 1")
        modality, other = _modality("queries", queries), _modality("candidates", candidates)
        if modality == other:
            raise ValueError(
                f"rank: queries and candidates are both {modality}s; give pictures and texts (a string is a "
                "picture where it names an existing picture file)"
            )
        images, texts = (queries, candidates) if modality == "image" else (candidates, queries)
        pairs = self._pair_dataset(images, texts)
        ends = self.scorer.embeddings(pairs)
        asking, gallery = ends if modality == "image" else ends[::-1]
        rerank = rerank and self.model is not None
        chosen = first_stage_candidates(asking, gallery, max(k, self.config.retrieval.k) if rerank else k)
        first = torch.stack([row @ gallery[found].T for row, found in zip(asking, chosen, strict=True)])
        if not rerank:
            return [_hits(found, scores, None, scores) for found, scores in zip(chosen, first, strict=True)]
        asked = torch.arange(len(asking))[:, None].expand_as(chosen).flatten(), chosen.flatten()
        joint = self.scorer.pairs(pairs, *(asked if modality == "image" else asked[::-1])).view_as(first)
        final = fused(first, joint, self.alpha)
        return [_hits(*row)[:k] for row in zip(chosen, first, joint, final, strict=True)]

    def pair_graph(self, image: Picture, text: str) -> dgl.DGLGraph:
        """The cross-modal feature graph of an image and a text, with the attention of every relation.

        `ndata["feat"]` holds the backbone features of both node types, `ndata["position"]` what the positional
        encoding reads, `nodes["patch"].data["box"]` left, top, right and bottom of each patch in pixels of the
        picture, `nodes["token"].data["span"]` first character of each token and the one after its last.
        `edata["attention"]` is (E, layers, heads) for each relation, over the layers that have it.

        Raises
        ------
        DataError
            If the picture or the text cannot be used.
        """
        model, pair = self.graph_model, self.pair(image, text)
        nodes = model.to_device(pair.image), model.to_device(pair.caption)
        graph = model.eval().pair_graphs(*nodes)
        with torch.no_grad():
            model(graph, attention=True)
        graph.nodes["patch"].data["box"] = torch.tensor(pair.boxes)
        graph.nodes["token"].data["span"] = torch.tensor(pair.spans)
        return graph

    def attention(self, image: Picture, text: str, folder: str | Path | None = None) -> Inspection:
        """Attention of an image with a text, relation by relation, and the score without each relation.

        Parameters
        ----------
        folder
            Where to write `inspect.html` (a page to point at), PNG overlays, and every weight as
            `attention.safetensors` and `attention.json`; None to write nothing.

        Raises
        ------
        DataError
            If the picture or the text cannot be used.
        """
        inspection = inspect_pair(self.graph_model, self.pair(image, text))
        if folder is not None:
            write_inspection(inspection, Path(absolute(str(folder))))
            write_attention(inspection, Path(folder))
            write_overlays(inspection, Path(folder))
        return inspection

    @torch.no_grad()
    def pair(self, image: Picture, text: str) -> Pair:
        """An image with a text, as the model and as a person reads them.

        Raises
        ------
        DataError
            If the picture or the text cannot be used.
        """
        picture, tokenised = self._read(image), self.text.prepare(text)
        return Pair(
            name=Path(image).name if isinstance(image, (str, Path)) else "picture",
            picture=picture,
            view=self.vision.view(*picture.size),
            text=text,
            spans=tuple((int(a), int(b)) for a, b in tokenised.spans[tokenised.kept]),
            words=tuple(tokenised.words[tokenised.kept].tolist()),
            image=self.graph_model.encoders.features(read_pictures(self._vision, [picture])),
            caption=self.graph_model.encoders.features(read_texts(self.config, self.text, [text])),
        )

    @property
    def graph_model(self) -> CMFG:
        """The graph model; ConfigError for an aligned model as it is, which has none."""
        if self.model is None:
            name = self.config.features.aligned
            raise ConfigError(f"{name}: has no trained joint stage; train one with features.aligned={name}")
        return self.model

    @cached_property
    def correction(self) -> Correction | None:
        """The hubness correction on its query bank; None where the configuration has no correction."""
        correction = make_correction(self.config.retrieval)
        if correction is not None and self.query_bank is not None:
            correction.fit(self.query_bank.images, self.query_bank.texts)
        return correction

    @cached_property
    def scorer(self) -> Scorer:
        """Both stages as a `Scorer`, the first with the hubness correction."""
        return self.make_scorer()

    def make_scorer(self, progress: Callable[[str, int, int], object] | None = None) -> Scorer:
        """The same as `scorer`, with progress of the second stage: called with (what, done, total)."""
        return corrected(self._first_scorer if self.model is None else self.graph_scorer(progress), self.correction)

    def graph_scorer(self, progress: Callable[[str, int, int], object] | None = None) -> GraphScorer:
        """Both stages as a `Scorer`, without the hubness correction."""
        told = None if progress is None else lambda done, total: progress("re-ranking", done, total)
        return GraphScorer(self.graph_model, pair_batch=self.config.retrieval.pair_batch, progress=told)

    @property
    def _first_scorer(self) -> GraphScorer | AlignedScorer:
        """The first stage without the hubness correction."""
        return AlignedScorer() if self.model is None else self.graph_scorer()

    @property
    def _parts(self) -> Parts:
        return Parts(*(getattr(self, name) for name in Parts._fields))

    def _embed(self, modality: str, items: Sequence[Picture], batch_size: int, progress: Progress | None) -> Tensor:
        scorer, encoder = self._first_scorer, self.vision if modality == "image" else self.text
        parts = [
            scorer.embed_items(_item_set(modality, nodes))
            for nodes in self._encode(modality, items, batch_size, progress)
        ]
        width = encoder.pooled_width or self.config.model.width
        embeddings = torch.cat(parts) if parts else torch.zeros(0, width)
        return embeddings if self.correction is None else self.correction.transform(modality, embeddings)

    def _encode(
        self, modality: str, items: Sequence[Picture], batch_size: int = 32, progress: Progress | None = None
    ) -> Iterator[Nodes]:
        """Nodes of `batch_size` items at a time, rounded as the feature store rounds."""
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            if modality == "image":
                yield read_pictures(self._vision, [self._read(image) for image in batch])
            else:
                yield read_texts(self.config, self.text, [str(text) for text in batch])
            if progress is not None:
                progress(start + len(batch), len(items))

    @cached_property
    def _vision(self) -> VisionEncoder:
        """The image encoder, or what makes the inputs of a tuned one."""
        return load_vision_inputs(self.config, self.vision) or self.vision

    def _read(self, image: Picture) -> Image.Image:
        if isinstance(image, Image.Image):
            return to_rgb(image)
        if isinstance(image, np.ndarray):
            return to_rgb(Image.fromarray(image))
        data = self.config.data
        return read_image(Path(image).expanduser(), max_pixels=data.max_pixels, max_bytes=data.max_bytes)

    def _pair_dataset(self, images: Sequence[Picture], texts: Sequence[str | Picture]) -> PairDataset:
        """Images and texts in memory; they are no pairs, so no text has an image of its own."""
        distinct, which = _distinct(texts)
        patches = concatenate(list(self._encode("image", images)))
        tokens = concatenate(list(self._encode("text", distinct))).select(which)
        none = torch.full((len(texts),), -1)
        return PairDataset(_item_set("image", patches), _item_set("text", tokens), none)


def _distinct(texts: Sequence[str | Picture]) -> tuple[list[str], Tensor]:
    """The distinct texts in the order of their first occurrence, and which of them each text is, int64 (M,)."""
    position: dict[str, int] = {}
    which = [position.setdefault(str(text), len(position)) for text in texts]
    return list(position), torch.tensor(which, dtype=torch.int64)


def _item_set(modality: str, nodes: Nodes) -> ItemSet:
    return ItemSet(modality, len(nodes), nodes.select)


def _hits(chosen: Tensor, first: Tensor, joint: Tensor | None, final: Tensor) -> list[Hit]:
    """Hits of one query by falling final score; all (K,), `chosen` by falling first-stage score."""
    order = final.argsort(descending=True, stable=True).tolist()
    return [Hit(int(chosen[i]), float(final[i]), i + 1, None if joint is None else float(joint[i])) for i in order]


def _modality(argument: str, items: Sequence[Picture]) -> str:
    """`image` or `text`, which all of the items must be."""
    if isinstance(items, (str, Path, Image.Image, np.ndarray)):
        raise ValueError(f"rank: {argument} is one item; give a list")
    found = {"image" if _is_picture(item) else "text" for item in items}
    if len(found) != 1:
        fault = "mix pictures and texts" if found else "are empty"
        raise ValueError(f"rank: {argument} {fault}; give one modality")
    return found.pop()


def _is_picture(item: Picture) -> bool:
    if not isinstance(item, str):
        return True
    path = Path(item)
    try:
        return path.suffix.lower() in IMAGE_SUFFIXES and path.expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # a text may be too long, or hold a NUL, for a path
        return False
