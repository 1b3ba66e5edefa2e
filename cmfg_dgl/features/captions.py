"""What a text encoder reads of captions: tokens that it does not know, captions that it cuts or confuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cmfg_dgl.data.splits import normalise_caption
from cmfg_dgl.features.encoders.text import TextEncoder

__all__ = ["MANY", "CaptionReading", "read_captions"]

MANY = 0.05
"""Share of the tokens, or of the captions, above which a warning is due."""


@dataclass(frozen=True)
class CaptionReading:
    """How a text encoder reads captions.

    Parameters
    ----------
    encoder, key, max_tokens
        Name of the encoder, the configuration key that names it, and the most tokens of a caption that it reads.
    captions, tokens
        How many captions there are, and how many tokens of them are read.
    unknown
        Of these tokens, those that stand for something that is not in the encoder's vocabulary.
    cut
        Captions that are longer than `max_tokens`.
    confused
        Captions whose tokens are those of a caption with another text, both not cut.
    confused_by_cut
        The same, where one of the two is cut.
    example
        A text with an unknown token, else ''.
    """

    encoder: str
    key: str
    max_tokens: int
    captions: int
    tokens: int
    unknown: int
    cut: int
    confused: int
    confused_by_cut: int
    example: str

    def warnings(self) -> Iterator[tuple[str, str]]:
        """Code and message of each thing that spoils features, with its remedy."""
        name, count = self.encoder, f"{self.captions:,} captions"
        if self.unknown > MANY * self.tokens:
            yield (
                "unknown-tokens",
                f"{self.unknown / self.tokens:.0%} of the tokens of the captions are unknown to {name}, as in "
                f"{self.example!r}; set {self.key} to a model of their language, such as a multilingual BERT",
            )
        if self.confused > MANY * self.captions:
            yield (
                "equal-tokens",
                f"{self.confused:,} of {count} are to {name} the same tokens as a caption of another text, and "
                f"cannot be told apart; set {self.key} to another model",
            )
        if self.cut:
            equal = f", and {self.confused_by_cut:,} are then equal to others" if self.confused_by_cut else ""
            yield (
                "cut-caption",
                f"{self.cut:,} of {count} are longer than features.max_tokens={self.max_tokens} and are "
                f"cut{equal}; raise it, as far as {self.key} allows, or shorten them",
            )


def read_captions(encoder: TextEncoder, texts: Sequence[str]) -> CaptionReading:
    """Tokenise captions, without loading the weights of their encoder.

    Raises
    ------
    ConfigError
        If there is no such encoder.
    """
    tokens = unknown = cut = 0
    example = ""
    # Tokens to the normalised texts that have them, and whether any of these was cut.
    texts_of: dict[tuple[int, ...], set[str]] = {}
    was_cut: set[tuple[int, ...]] = set()
    tokens_of: list[tuple[int, ...]] = []
    for text, (ids, unknown_ids, is_cut) in zip(texts, encoder.token_ids(texts), strict=True):
        tokens, unknown, cut = tokens + len(ids), unknown + unknown_ids, cut + is_cut
        example = example or (text[:60] if unknown_ids else "")
        texts_of.setdefault(ids, set()).add(normalise_caption(text))
        tokens_of.append(ids)
        if is_cut:
            was_cut.add(ids)
    confused = [ids for ids in tokens_of if len(texts_of[ids]) > 1]
    by_cut = sum(ids in was_cut for ids in confused)
    return CaptionReading(
        encoder=encoder.name,
        key=encoder.key,
        max_tokens=encoder.max_tokens,
        captions=len(texts),
        tokens=tokens,
        unknown=unknown,
        cut=cut,
        confused=len(confused) - by_cut,
        confused_by_cut=by_cut,
        example=example,
    )
