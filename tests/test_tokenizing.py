"""Long texts are tokenized in parts: the ids are those of the whole, with every kind of tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from diloco.corpus import tokenizing
from diloco.corpus.tokenizing import Subwords

WORDS = [
    "spam",
    "eggs",
    "ham",
    "(and)",
    "more,",
    "don't",
    "3.14",
    "x=[1];",
    "über",
    "naïve",
    "汉字。字",
    "it's...",
    "end.",
    "Σίσυφος",
    "\t!",
    "#!",
]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def prose(words: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    ends = [" "] * 12 + ["\n", "\n\n", "  \n", "  ", "\n    ", " \n\n\n"]
    return "".join(draw.choice(WORDS) + draw.choice(ends) for _ in range(words))


def _bpe(**options: Any) -> tuple[Tokenizer, Any]:
    return Tokenizer(models.BPE(unk_token="<unk>", **options)), trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )


def gpt2(prefix: bool = False) -> Tokenizer:
    tokenizer, trainer = _bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.train_from_iterator([prose(3000, 1), "\n\n" * 1000, "  \n" * 1000], trainer)
    return tokenizer


def llama3() -> Tokenizer:
    tokenizer, trainer = _bpe()
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.train_from_iterator([prose(3000, 1)], trainer)
    return tokenizer


def llama2() -> Tokenizer:
    """As SentencePiece's BPE is converted: a text is one word that begins with a ▁."""
    tokenizer, trainer = _bpe(fuse_unk=True)
    tokenizer.train_from_iterator(["▁" + word for word in prose(3000, 1).split()], trainer)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def unigram(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    options = {"vocab_size": 200, "special_tokens": ["<unk>", "</s>"], "unk_token": "<unk>"}
    tokenizer.train_from_iterator([prose(3000, 1)], trainers.UnigramTrainer(**options))
    return tokenizer


def bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    options = {"vocab_size": 300, "special_tokens": ["<unk>", "</s>"]}
    tokenizer.train_from_iterator([prose(3000, 1)], trainers.WordPieceTrainer(**options))
    return tokenizer


def superwords() -> Tokenizer:
    """Tokens that go on behind spaces and line ends."""
    tokenizer, trainer = _bpe()
    tokenizer.train_from_iterator([prose(12, seed) for seed in range(300)], trainer)
    return tokenizer


def pairs() -> Tokenizer:
    """Tokens of two characters each, counted from the text's beginning: no cut is right."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(2)
    options = {"vocab_size": 2000, "special_tokens": ["<unk>", "</s>"]}
    tokenizer.train_from_iterator([prose(3000, 1)], trainers.WordLevelTrainer(**options))
    return tokenizer


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": gpt2,
    "prefix": lambda: gpt2(prefix=True),
    "llama3": llama3,
    "llama2": llama2,
    "metaspace-always": lambda: unigram("always"),
    "metaspace-first": lambda: unigram("first"),
    "metaspace-never": lambda: unigram("never"),
    "bert": bert,
    "superwords": superwords,
    "pairs": pairs,
}


@cache
def made(kind: str) -> Tokenizer:
    return MAKERS[kind]()


class Watched:
    """A tokenizer, and how many characters each call gave it."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner
        self.given: list[int] = []

    def encode_batch_fast(self, texts: Sequence[str], **options: Any) -> Any:
        self.given.append(sum(map(len, texts)))
        return self._inner.encode_batch_fast(texts, **options)


def ours(kind: str) -> tuple[Subwords, Watched]:
    tokenizer = Subwords(made(kind), "</s>")
    tokenizer._inner = watched = Watched(made(kind))
    return tokenizer, watched


def whole(kind: str, text: str) -> list[int]:
    ids: list[int] = made(kind).encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("kind", MAKERS)
def test_a_long_text_has_the_ids_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "PART", 500)
    monkeypatch.setattr(tokenizing, "LEAD", 100)
    text = prose(6000)
    tokenizer, watched = ours(kind)
    [short, ids, empty] = tokenizer.encode(["spam", text, ""])
    assert ids.tolist() == whole(kind, text) and short.tolist() == whole(kind, "spam") and len(empty) == 0
    assert (max(watched.given) < 2500) == (kind != "pairs")


@pytest.mark.parametrize("kind", MAKERS)
@given(text=st.text("ab'. ,\n\t\r(字é\u0301<>/s", max_size=60), part=st.integers(1, 9))
def test_parts_change_no_ids(kind: str, text: str, part: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "PART", part)
        [ids] = ours(kind)[0].encode([text])
    assert ids.tolist() == whole(kind, text)


def test_a_text_without_lines_or_spaces_is_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "PART", 500)
    monkeypatch.setattr(tokenizing, "LEAD", 100)
    tokenizer, watched = ours("gpt2")
    text = "汉字很多，" * 1000
    assert tokenizer.encode([text])[0].tolist() == whole("gpt2", text) and max(watched.given) < 2500


def test_a_long_document_is_encoded_in_bounded_batches() -> None:
    """Not all of its parts at once."""
    text = prose(200_000)
    tokenizer, watched = ours("gpt2")
    [ids] = tokenizer.encode([text])
    assert len(text) > 3 * tokenizing.PART and max(watched.given) < 1.1 * tokenizing.PART
    assert sum(watched.given) < 1.1 * len(text) and np.array_equal(ids, whole("gpt2", text))
