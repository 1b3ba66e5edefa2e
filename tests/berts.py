"""A BERT with random weights, a few blocks and a few words, as a folder of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers


def save_bert(
    folder: Path, *, seed: int = 0, words: Sequence[str] = ("red", "car"), positions: int = 16, blocks: int = 1
) -> Path:
    """Save a BERT of width 16 that knows these words; gives its folder."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    config = transformers.BertConfig(
        vocab_size=max(20, len(vocabulary)),
        hidden_size=16,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=positions,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    return folder
