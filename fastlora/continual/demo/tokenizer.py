"""Word-level tokenizer of the demo model, called like those of open_clip."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import torch

from fastlora.continual.demo import captions, world

CONTEXT = 16
_PAD, _START, _END = "<pad>", "<start>", "<end>"


def _words() -> tuple[str, ...]:
    patterns = " ".join(
        (*captions.SINGLE, *captions.SEVERAL, *captions.SWATCH, *captions.GLYPH, *captions.PLACES.values())
    )
    function_words = re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", patterns))
    nouns = [form for shape in world.SHAPES for form in (shape, captions.plural(shape))]
    concepts = [*nouns, *world.COLOURS, *world.TEXTURES, *captions.NUMBERS, *world.DIGITS, *world.LETTERS]
    extra = ["an", "digit", "letter"]
    return tuple(sorted({word.lower() for word in (*function_words, *concepts, *extra)}))


class WordTokenizer:
    """Splits on blanks, ignores case and punctuation, one id per word.

    Ids: 0 pads, 1 starts, then the words in alphabetical order, and the end marker last, because open_clip pools the
    text features at the highest id of a row.

    Args:
        context_length: length of a row, start and end marker included.
    """

    def __init__(self, context_length: int = CONTEXT) -> None:
        self.context_length = context_length
        self.words: tuple[str, ...] = (_PAD, _START, *_words(), _END)
        self._ids = {word: index for index, word in enumerate(self.words)}
        self.sot_token_id = self._ids[_START]
        self.eot_token_id = self._ids[_END]

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words, without start and end marker. ValueError names an unknown word and its neighbour."""
        return [self._id(word, text) for word in re.sub(r"[^\w\s]", " ", text.lower()).split()]

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """The words of a row; markers and padding left out."""
        special = (0, self.sot_token_id, self.eot_token_id)
        return " ".join(self.words[i] for i in map(int, ids) if i not in special)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> torch.Tensor:
        """LongTensor [n, context_length], zero-padded.

        Raises:
            ValueError: an unknown word, or a text with more than context_length - 2 words.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = context_length or self.context_length
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text), self.eot_token_id]
            if len(ids) > length:
                raise ValueError(
                    f"text {text!r} has {len(ids) - 2} words; the demo model reads at most {length - 2}. "
                    "Shorten the template or the class name."
                )
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _id(self, word: str, text: str) -> int:
        index = self._ids.get(word)
        if index is None:
            nearest = difflib.get_close_matches(word, self.words[2:-1], n=1, cutoff=0.0)[0]
            raise ValueError(
                f"word {word!r} in {text!r} is not among the {self.vocab_size - 3} words of the demo tokenizer; "
                f"the nearest is {nearest!r}. Use known words (tokenizer.words) in templates and class names."
            )
        return index
