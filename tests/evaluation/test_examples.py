"""Pins of the examples.

- Queries are evenly spaced over the split, the first and the last among them, in both directions.
- The results are the best of both stages together, best first, with their scores, and say which are correct.
- Pictures are small PNG data URIs of the right image, whose sides keep their ratio; texts are the right captions.
- Fewer queries or a smaller gallery than asked for give fewer, not an error; all of it is JSON.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from planted import planted, random_scorer

from cmfg_dgl.data.dataset import CaptionItem, Dataset, ImageItem
from cmfg_dgl.evaluation.evaluate import score
from cmfg_dgl.evaluation.examples import decode_picture, retrieved_examples

SPLIT = [9, 2, 4, 7, 1, 0, 8]
"""Images of the split, in no order; each has its own colour, and two or three captions in the data set."""


def colour(image):
    return (20 * image, 255 - 20 * image, 7 * image)


def caption(image, number):
    return f"<b>picture {image}</b>, told for the {number}. time"


@pytest.fixture(scope="module")
def toy():
    captions = tuple(
        CaptionItem(f"cap{image}-{number}", image, caption(image, number))
        for number in range(3)
        for image in range(10)
        if number < 2 + image % 2
    )
    images = tuple(ImageItem(f"img{i}", f"/x/img{i}.png", f"{i:064d}") for i in range(10))
    return Dataset(
        "toy",
        images,
        captions,
        {"test": np.array(SPLIT), "one": np.array([3])},
        "rule",
        lambda item: Image.new("RGB", (400, 200), colour(int(item.id[3:]))),
    )


def scored(toy, name, k, seed=0):
    view = toy.split(name)
    pair_dataset = planted(np.bincount(view.caption_image).tolist(), seed)
    pair_dataset = replace(pair_dataset, caption_image=torch.from_numpy(view.caption_image))
    scorer = random_scorer(pair_dataset, seed)
    return view, scorer, score(scorer, pair_dataset, k=k)


def ranked(first, joint, k, alpha):
    """Positions of the gallery, best first, for one query."""
    order = sorted(range(len(first)), key=lambda g: -first[g])
    best = sorted(order[:k], key=lambda g: -(alpha * joint[g] + (1 - alpha) * first[g]))
    return best + order[k:]


@pytest.mark.parametrize(("k", "alpha"), [(3, 0.0), (3, 1.0), (6, 0.5), (100, 0.7)])
def test_results_are_the_best_of_both_stages(toy, k, alpha):
    view, scorer, scores = scored(toy, "test", k)
    examples = retrieved_examples(toy, view, scores, alpha, queries=50)
    sides = [example["direction"] for example in examples]
    assert sides == ["i2t"] * 7 + ["t2i"] * len(view.captions)
    full = (scorer.images @ scorer.captions.T).double().numpy()
    joint = scorer.joint.double().numpy()
    correct = 0
    for name, first, second in (("i2t", full, joint), ("t2i", full.T, joint.T)):
        own = [example for example in examples if example["direction"] == name]
        for query, example in enumerate(own):
            best = ranked(first[query], second[query], k, alpha)[:5]
            results = example["results"]
            assert len(results) == 5
            assert [r["score"] for r in results] == sorted((r["score"] for r in results), reverse=True)
            for item, result in zip(best, results, strict=True):
                image, text = (query, item) if name == "i2t" else (item, query)
                assert shown(result) == expected(toy, view, item, "t2i" if name == "i2t" else "i2t")
                assert result["correct"] is bool(view.caption_image[text] == image)
                correct += result["correct"]
            assert shown(example["query"]) == expected(toy, view, query, name)
    assert correct > 10


def shown(item):
    """The text, or the colour of the picture."""
    if "text" in item:
        return item["text"]
    return decode_picture(item["image"]).convert("RGB").getpixel((5, 5))


def expected(toy, view, position, direction):
    """What a query of a direction shows; a result shows what a query of the other does."""
    if direction == "i2t":
        return colour(int(view.images[position]))
    return toy.captions[view.captions[position]].text


@pytest.mark.parametrize(("asked", "images"), [(5, [0, 1, 3, 4, 6]), (2, [0, 6]), (7, list(range(7)))])
def test_queries_are_evenly_spaced(toy, asked, images):
    view, _, scores = scored(toy, "test", 4)
    examples = retrieved_examples(toy, view, scores, 0.5, queries=asked)
    for name in ("i2t", "t2i"):
        queries = [shown(example["query"]) for example in examples if example["direction"] == name]
        assert len(queries) == asked
        count = len(view.images if name == "i2t" else view.captions)
        wanted = [int(at) for at in np.linspace(0, count - 1, asked)]
        assert queries == [expected(toy, view, at, name) for at in wanted]
        if name == "i2t":
            assert wanted == images


def test_pictures(toy):
    view, _, scores = scored(toy, "test", 4)
    examples = retrieved_examples(toy, view, scores, 0.5)
    assert len(examples) == 10
    assert json.loads(json.dumps(examples, allow_nan=False)) == examples
    pictures = [item for e in examples for item in (e["query"], *e["results"]) if "image" in item]
    assert len(pictures) == 5 + 5 * 5
    for item in pictures:
        assert item["image"].startswith("data:image/png;base64,") and item.keys() <= {"image", "score", "correct"}
        with decode_picture(item["image"]) as picture:
            assert (picture.format, picture.size) == ("PNG", (96, 48))


def test_a_split_of_one_image(toy):
    view, _, scores = scored(toy, "one", 4)
    image, *texts = retrieved_examples(toy, view, scores, 0.5)
    assert image["direction"] == "i2t" and len(image["results"]) == 3
    assert all(result["correct"] for result in image["results"])
    assert [len(text["results"]) for text in texts] == [1, 1, 1]
