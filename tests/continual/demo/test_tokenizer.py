"""Word-level tokenizer: rows as open_clip reads them, and clear errors."""

import pytest
import torch

from fastlora.continual.demo.tokenizer import CONTEXT, WordTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return WordTokenizer()


def test_rows(tokenizer):
    rows = tokenizer(["a red star", "two circles on the left"])
    assert rows.shape == (2, CONTEXT) == (2, 16) and rows.dtype == torch.int64
    assert rows[:, 0].tolist() == [tokenizer.sot_token_id] * 2
    assert rows.argmax(dim=1).tolist() == [4, 6]  # open_clip pools at the highest id of a row
    assert rows[0, 5:].eq(0).all() and tokenizer.eot_token_id == tokenizer.vocab_size - 1 == int(rows.max())


def test_vocabulary_is_small_and_sorted(tokenizer):
    assert 70 <= tokenizer.vocab_size <= 100
    assert list(tokenizer.words[2:-1]) == sorted(set(tokenizer.words[2:-1]))


def test_round_trip(tokenizer):
    words = tokenizer.words[2:-1]
    assert tokenizer.decode([i for word in words for i in tokenizer.encode(word)]) == " ".join(words)
    text = "a drawing of two striped red hearts"
    assert tokenizer.decode(tokenizer(text)[0]) == text


def test_case_and_punctuation_do_not_matter(tokenizer):
    assert torch.equal(tokenizer("The letter B."), tokenizer(["the letter b"]))


def test_no_texts_give_no_rows(tokenizer):
    assert tokenizer([]).shape == (0, 16)


def test_unknown_word_names_its_neighbour(tokenizer):
    with pytest.raises(
        ValueError, match=r"word 'circel' in 'a red circel' is not among the 85 words .* nearest is 'circle'"
    ):
        tokenizer("a red circel")


def test_too_long_a_text_is_refused(tokenizer):
    assert tokenizer(" ".join(["a"] * 14))[0, -1] == tokenizer.eot_token_id
    with pytest.raises(ValueError, match="has 15 words; the demo model reads at most 14. Shorten"):
        tokenizer(" ".join(["a"] * 15))


def test_another_context_length(tokenizer):
    assert tokenizer("a star", context_length=4).shape == (1, 4)
    assert WordTokenizer(context_length=8)("a star").shape == (1, 8)
    with pytest.raises(ValueError, match="reads at most 1"):
        tokenizer("a star", context_length=3)
