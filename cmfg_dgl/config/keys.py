"""Every configuration key: one dataclass a section, each key documented where it is defined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "PACKAGED_ENCODERS",
    "PRECOMPUTED",
    "BenchConfig",
    "Config",
    "DataConfig",
    "FeaturesConfig",
    "GraphConfig",
    "ModelConfig",
    "RelationConfig",
    "RetrievalConfig",
    "RunConfig",
    "ScenesConfig",
    "TrainingConfig",
    "TuneConfig",
    "default_relations",
    "option",
]

EVIDENCE_WIDTH = 64
"""Width of the evidence of `model.matching_head: reasoning`."""

PRECOMPUTED = "precomputed"
"""Name of the data set whose images are region features, and of what stands for its image encoder."""


PACKAGED_ENCODERS = ("hybrid", "pyramid", "dinov2", PRECOMPUTED, "minilm")
"""Values of `features.vision` and `features.text` that are no paths and no names on a hub."""


def option(
    default: Any,
    doc: str,
    *,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """A key with its documentation, its choices and its inclusive bounds."""
    metadata = {"doc": doc, "choices": choices, "least": least, "most": most}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ScenesConfig:
    """What `data.name: scenes` makes."""

    train: int = option(4000, "scenes of the training split", least=1)
    val: int = option(500, "scenes of the validation split", least=1)
    test: int = option(1000, "scenes of the test split", least=1)
    objects: list[int] = option([1, 4], "the fewest and the most objects of a scene, from 1 to 4")


@dataclass
class DataConfig:
    """Which pairs, and how they are split."""

    name: str = option("openmoji", "data set; `cmfg data ls` lists them")
    root: str | None = option(
        None,
        "folder or file of the data set, where it is not a package; huggingface: also a name on the hub",
    )
    image_column: str | None = option(None, "huggingface: column of the images, where the schema leaves a choice")
    caption_column: str | None = option(
        None, "huggingface: column of the captions, where the schema leaves a choice"
    )
    rows: int | None = option(
        None,
        "huggingface, theojiang300k: read the first rows of each split only, streamed; default all",
        least=1,
    )
    language: str = option("en", "openmoji, tuxpaint: language of the captions, such as fr or ja")
    protocol: str = option(
        "A", "mirflickr25k: which items are trained on, searched and searched for", choices=("A", "B", "paper")
    )
    fractions: dict[str, float] = option(
        {"train": 0.6, "val": 0.1, "test": 0.3}, "share of each split, where the data set brings no splits"
    )
    seed: int = option(0, "seed of the split by hash, and of `scenes`", least=0)
    train_pairs: int | None = option(
        None, "train on so many pairs, the first by hash: smaller sets lie within larger ones; default all", least=1
    )
    near_duplicate: float = option(
        0.75, "captions whose word sets are this similar (Jaccard) share a split", least=0.1, most=1.0
    )
    max_bad_fraction: float = option(
        0.05,
        "training fails when a larger share of the pairs of a split is lost",
        least=0.0,
        most=1.0,
    )
    exclude: str | None = option(
        None, "file with the ids of images and captions to leave out; `cmfg data check --write-exclude` writes one"
    )
    follow_links: bool = option(False, "use files outside of `root` that links in it lead to")
    max_pixels: int = option(
        64_000_000, "a larger image is refused before it is decoded, or before it is made larger", least=1
    )
    max_bytes: int = option(64 << 20, "a larger image file is refused before it is read", least=1)
    scenes: ScenesConfig = field(default_factory=ScenesConfig)


@dataclass
class FeaturesConfig:
    """Frozen backbones and the store of what they give."""

    dir: str | None = option(None, "folder of the feature stores; default $CMFG_CACHE or ~/.cache/cmfg")
    vision: str = option(
        "hybrid",
        "`hybrid` (EfficientNet-lite0 grid), `pyramid` (three stages of it on one grid), `dinov2` (a packaged "
        "ViT-S/14), a transformers ViT by name or path, several of these joined by + (`hybrid+dinov2`), or "
        "`precomputed`",
    )
    layer: int | None = option(
        None,
        "hidden state of a ViT whose patches become nodes, from 1 to its number of layers; default the last, "
        "which alone has the model's final layer normalisation",
        least=1,
    )
    image_size: int | None = option(
        None,
        "side of the square image in pixels, for each of joined encoders; default each encoder's own",
        least=32,
    )
    views: list[str] = option(
        [],
        "more views of each picture, whose feature maps are averaged with its own: mirror (one), rotate (two), "
        "crop (four)",
        choices=("mirror", "rotate", "crop"),
    )
    image_pool: int = option(
        1, "patches are averaged in squares of this side before they are stored; 2: a quarter of the store", least=1
    )
    image_project: int | None = option(
        None, "width of stored patches after a fixed random projection; default the encoder's own", least=1
    )
    text: str = option("minilm", "`minilm` (384 wide) or a transformers BERT by name or path")
    text_layers: list[int] = option(
        [],
        "hidden states of the BERT whose channels a token has side by side, from 0, the embeddings of words, to "
        "the last; default the last alone",
        least=0,
    )
    aligned: str | None = option(
        None,
        "a transformers model of both modalities in one space (CLIP, SigLIP) by name or path, in place of `vision` "
        "and `text`: the first stage starts as its similarity",
    )
    max_tokens: int = option(64, "longer captions are cut, and counted", least=1, most=512)
    batch_size: int = option(32, "images or captions a forward pass of an encoder", least=1)
    precision: str = option(
        "fp32",
        "precision of matrix products in a ViT and in BERT; stems stay in fp32",
        choices=("fp32", "bf16"),
    )
    compile: bool = option(
        False, "run the image encoder under torch.compile: faster, rounds differently, needs a C++ compiler"
    )
    shard_items: int = option(256, "images or captions a file of the store", least=1)
    workers: int = option(
        1, "processes that extract, each with its own encoder and its part of the threads", least=1
    )


@dataclass
class RelationConfig:
    """One relation: who sends to whom, over which edges."""

    source: str = option("", "node type that sends: patch or token", choices=("", "patch", "token"))
    target: str = option("", "node type that receives: patch or token", choices=("", "patch", "token"))
    topology: str = option(
        "complete",
        "which edges; none leaves the relation out",
        choices=("complete", "grid", "knn", "window", "topk", "none"),
    )
    radius: int = option(1, "grid: neighbours within this many rows and columns", least=1)
    k: int = option(8, "knn, topk: sources a target listens to", least=1)
    size: int = option(2, "window: tokens to each side", least=1)
    directed: bool = option(
        False,
        "one relation each for where the source lies: patch to patch left, right, above, below; token to token "
        "before, after",
    )


def default_relations() -> dict[str, RelationConfig]:
    """The relations of the cross-modal feature graph, by name."""
    return {
        "spatial": RelationConfig("patch", "patch", "grid", radius=1),
        "similar": RelationConfig("patch", "patch", "none", k=8),
        "context": RelationConfig("token", "token", "complete"),
        "grounds": RelationConfig("patch", "token", "complete"),
        "describes": RelationConfig("token", "patch", "complete"),
    }


@dataclass
class GraphConfig:
    """The relations of the cross-modal feature graph."""

    relations: dict[str, RelationConfig] = field(
        default_factory=default_relations, metadata={"doc": "relation name to its settings"}
    )


@dataclass
class ModelConfig:
    """The attention-weighted graph layers and what surrounds them."""

    width: int = option(256, "width of nodes and of the shared space", least=1)
    heads: int = option(4, "attention heads; width is a multiple of it", least=1)
    layers: int = option(2, "graph layers in all", least=1)
    cross_layers: int = option(
        1, "factorised stacking: the last layers, which alone have cross-modal relations", least=0
    )
    stacking: str = option(
        "factorised",
        "intra-modal layers first, or all relations in every layer",
        choices=("factorised", "interleaved"),
    )
    softmax: str = option(
        "relation",
        "attention sums to 1 within a relation, or over all that enter a node",
        choices=("relation", "joint"),
    )
    edge_weights: str = option(
        "per_layer", "attention in every layer, or once on the initial nodes", choices=("per_layer", "once")
    )
    attention: str = option(
        "dot",
        "logit of an edge: the scaled inner product of query and key (the paper's), their cosine times an inverse "
        "temperature that the relation learns, or 0, so that all neighbours weigh the same (uniform)",
        choices=("dot", "cosine", "uniform"),
    )
    weights: str = option(
        "relation",
        "W_Q, W_K and W for each relation, one of each for all relations (the paper's), or none: nodes are "
        "compared and summed as they are",
        choices=("relation", "shared", "none"),
    )
    residual: bool = option(True, "add a layer's input to its output")
    norm: str = option(
        "layer",
        "normalise the input of each layer: by layer normalisation, to unit length, or not",
        choices=("layer", "unit", "none"),
    )
    pooling: str = option("mean", "nodes to one vector", choices=("mean", "attention", "max"))
    matching_head: str = option(
        "pooled",
        "score of a pair in its joint graph: the cosine of both pooled vectors, or the mean over nodes of a "
        "learned score (node) or of the cosine (cosine) of each node with its aggregated cross-modal message; "
        "reasoning adds to the cosines what intra-modal relations make of the nodes' evidence",
        choices=("pooled", "node", "cosine", "reasoning"),
    )
    init: str = option(
        "cca",
        "input projection: whitening and a linear map, initialised in closed form by CCA on the training split; "
        "standardisation by training statistics and a linear map with random weights (standard); layer "
        "normalisation and a linear map with random weights (random); or none beyond a linear map without bias "
        "where the width of the features is not that of the model",
        choices=("cca", "standard", "random", "none"),
    )
    first_stage: str = option(
        "graph",
        "embedding of an item: its pooled nodes after the intra-modal layers, or an input projection of its own of "
        "its mean features, so that both stages share no weights",
        choices=("graph", "projection"),
    )
    positions: bool = option(True, "add a learned encoding of where a node lies to the input of the first layer")
    ridge: float = option(
        1.0,
        "init cca: added to the variance of each feature, in units of their mean; few training pairs need more",
        least=1e-6,
    )
    kernel: str = option(
        "auto",
        "how a relation is computed, all with the same numbers: edge by edge, as a padded block, or by DGL's "
        "message passing; auto takes the faster of the first two",
        choices=("auto", "edge", "block", "dgl"),
    )
    block_density: float = option(
        0.2,
        "kernel auto: share of edges from which a large block is faster; `cmfg env --calibrate` measures it",
        least=0.0,
        most=1.0,
    )
    dropout: float = option(0.2, "dropout of the input of each layer", least=0.0, most=0.95)
    feature_dropout: float = option(
        0.5,
        "dropout of backbone features, whitened (init cca), standardised (standard) or projected (random, none)",
        least=0.0,
        most=0.95,
    )


@dataclass
class TuneConfig:
    """Encoders that are trained with the model; an encoder that is not tuned stays frozen."""

    text: str | None = option(
        None, "tune the text encoder: `all` of it, or how many of its last blocks; default nothing"
    )
    vision: int | None = option(
        None,
        "tune the ViT of `features.vision`: how many of its last blocks, counted from `features.layer`; default "
        "nothing",
        least=1,
    )
    lora: int | None = option(
        None,
        "tune low-rank adapters of this rank beside the linear maps of these blocks, not their weights (needs "
        "`pip install 'cmfg-dgl[lora]'`); default the weights",
        least=1,
    )
    learning_rate: float = option(3e-5, "peak learning rate of what is tuned", least=0.0)
    precision: str = option(
        "auto",
        "products of tuned encoders in training; auto is bf16 where the processor multiplies it, else fp32. What "
        "is evaluated is always made in fp32",
        choices=("auto", "bf16", "fp32"),
    )

    @property
    def active(self) -> bool:
        """Whether an encoder is trained with the model."""
        return self.text is not None or self.vision is not None


@dataclass
class TrainingConfig:
    """The objective and the optimiser."""

    epochs: int = option(15, "passes over the training pairs", least=1)
    batch_size: int = option(64, "pairs a step; they are each other's negatives", least=2)
    learning_rate: float = option(1e-3, "peak learning rate of AdamW", least=0.0)
    weight_decay: float = option(0.05, "decoupled weight decay of matrices", least=0.0)
    warmup: float = option(0.1, "share of the steps in which the learning rate rises", least=0.0, most=1.0)
    clip: float = option(1.0, "largest gradient norm", least=0.0)
    temperature: float = option(0.07, "starting temperature of both softmax losses", least=1e-3, most=10.0)
    label_smoothing: float = option(0.0, "share of the target spread over the batch (InfoNCE)", least=0.0, most=0.9)
    graphs: str = option(
        "factorised",
        "joint loss: from parts that are computed once an item, or from whole pair graphs; both give the same "
        "numbers, and the first is faster",
        choices=("factorised", "joint"),
    )
    joint_weight: float = option(1.0, "weight of the joint matching loss beside InfoNCE", least=0.0)
    joint_pairs: str = option(
        "hard",
        "pairs of the joint loss: the matching ones with the hardest wrong ones, or all pairs of a batch",
        choices=("hard", "all"),
    )
    hard_negatives: int = option(2, "joint loss: hardest wrong partners of each image and of each caption", least=1)
    distillation: float = option(
        0.0,
        "weight of a loss by which the first stage learns the softmax of the joint scores over the batch; these "
        "get no gradient from it; needs joint_pairs all",
        least=0.0,
    )
    hard_negative_batches: int = option(
        1,
        "so many pairs with captions near each other share a batch, as hard negatives; 1: chance",
        least=1,
    )
    patience: int = option(8, "stop after this many epochs without a better validation rsum", least=1)
    checkpoint_steps: int = option(50, "steps between checkpoints; one is also made after each epoch", least=1)
    shuffle_buffer: int | None = option(
        None,
        "pairs shuffled at a time, shard by shard, for a store larger than the memory; default all pairs at once",
        least=1,
    )
    tune: TuneConfig = field(default_factory=TuneConfig)


@dataclass
class RetrievalConfig:
    """The two stages."""

    k: int = option(32, "candidates of the first stage that the joint stage re-ranks", least=1)
    alpha: float | None = option(
        None,
        "weight of the joint score in the fused score; default: chosen on validation",
        least=0.0,
        most=1.0,
    )
    correction: str = option(
        "hubness",
        "hubness correction of first-stage scores: by the inverted softmax, by CSLS, or none",
        choices=("hubness", "csls", "none"),
    )
    query_bank: int = option(
        4096, "training items of each modality against which the correction measures hubness", least=1
    )
    inverse_temperature: float = option(
        8.0,
        "correction hubness: how much more the nearest of the query bank count than others, in inverse cosines; "
        "less in proportion with fewer than 400 training images",
        least=0.1,
    )
    csls_neighbours: int = option(10, "correction csls: nearest items of the query bank that count", least=1)
    pair_batch: int = option(512, "joint graphs scored at a time", least=1)
    query_batch: int = option(256, "queries ranked at a time", least=1)


@dataclass
class RunConfig:
    """Where the run writes and what it runs on."""

    output_dir: str = option("runs/default", "the run directory")
    seed: int = option(0, "seed of weights, batches and dropout", least=0)
    device: str = option("cpu", "torch device: cpu, cuda, cuda:1, ...")
    precision: str = option("fp32", "precision of matrix products", choices=("fp32", "bf16"))
    threads: int = option(0, "threads of torch; 0 leaves torch's choice", least=0)


@dataclass
class Config:
    """All of it."""

    data: DataConfig = field(default_factory=DataConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass
class BenchConfig:
    """What `cmfg bench` compares, and how much each method may spend."""

    recipes: list[str] = option(
        ["openmoji"], "training recipes, by name or file: each brings a data set, its features and CMFG's settings"
    )
    overrides: list[str] = option([], "key.path=value overrides of every recipe")
    methods: list[str] = option(["cmfg", "cca"], "methods, in the order in which they are run")
    seeds: list[int] = option([0], "each method is fitted once a seed; the settings are searched with the first")
    seeds_of: dict[str, list[int]] = option(
        {}, "method to seeds of its own in place of `seeds`; a test takes those that it shares with cmfg"
    )
    trials: int = option(1, "settings that each method may try, the best on validation is taken", least=1, most=3)
    settings: dict[str, list[dict[str, Any]]] = option(
        {}, "method to the settings that it tries in place of its own: what its class takes, of cmfg section.key"
    )
    minutes: float = option(
        5.0, "time budget of one fit; a method that reaches it keeps its best so far", least=0.01
    )
    output_dir: str = option("runs/bench", "the folder of the comparison")
