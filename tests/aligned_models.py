"""Small random models of two modalities in the files of real ones: CLIP, and SigLIP with its padding."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

LONGEST = 24
"""Tokens that the models read, special ones included."""

POOLED_WIDTH = 24
WORDS = ["a", "on", "the", "left", "right", "painted", "red", "green", "blue", "circle", "square", "triangle"]
TOWER = {
    "hidden_size": POOLED_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": LONGEST,
}


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIPModel with a byte-level tokenizer, an image processor that crops, and the scale of a trained CLIP."""
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    vocabulary = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LONGEST)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        vision_config=TOWER,
        text_config={**TEXT, **special, "vocab_size": len(vocabulary)},
        projection_dim=POOLED_WIDTH,
        logit_scale_init_value=4.6052,
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _save(folder, transformers.CLIPModel, config, seed, tokenizer, processor)


def save_siglip(folder: Path, seed: int = 0, side: str = "right") -> Path:
    """A SiglipModel, whose tokenizer pads on one side and gives no attention mask, with a scale and a bias."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=LONGEST,
        padding_side=side,
        model_input_names=["input_ids"],
    )
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    text = {**TEXT, **special, "vocab_size": len(vocabulary), "projection_size": POOLED_WIDTH}
    config = transformers.SiglipConfig(vision_config=TOWER, text_config=text)
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return _save(folder, transformers.SiglipModel, config, seed, tokenizer, processor)


SAVE = {"clip": save_clip, "siglip": save_siglip}


def _save(folder: Path, kind: Any, config: Any, seed: int, tokenizer: Any, processor: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            # So small as they begin, all items would have nearly equal vectors.
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.4)
        if hasattr(model, "logit_bias"):
            torch.nn.init.constant_(model.logit_scale, 4.7)
            torch.nn.init.constant_(model.logit_bias, -12.5)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


class Reference:
    """A saved model as transformers' own documentation uses it, item by item."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModel.from_pretrained(folder).eval()
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.padding = "max_length" if self.model.config.model_type == "siglip" else False

    @torch.inference_mode()
    def image(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Last hidden states (T, D) and the unit vector (P,)."""
        output = self.model.get_image_features(**self.processor(image, return_tensors="pt"))
        return output.last_hidden_state[0], F.normalize(output.pooler_output[0], dim=0)

    @torch.inference_mode()
    def text(self, text: str) -> tuple[Tensor, Tensor]:
        """Last hidden states (T, D) without those of special tokens and of padding, and the unit vector (P,)."""
        inputs = self.tokenizer(
            text, padding=self.padding, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        output = self.model.get_text_features(**inputs)
        words = [int(token) not in self.tokenizer.all_special_ids for token in inputs["input_ids"][0]]
        return output.last_hidden_state[0][words], F.normalize(output.pooler_output[0], dim=0)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, P)."""
        return torch.stack([self.image(image)[1] for image in images])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (M, P)."""
        return torch.stack([self.text(text)[1] for text in texts])
