"""Text to token ids: bytes, or any tokenizer of Hugging Face's `tokenizers`, GPT-2's two files included."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from diloco.errors import ConfigError

GPT2 = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
"""The names that OpenAI and Hugging Face give them."""
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
"""What separates documents, if nobody says: the first that the tokenizer has."""
SIDES = ("tokenizer_config.json", "special_tokens_map.json")
PART = 1 << 18
"""Characters that a long document is cut at for tokenizing: a tokenizer takes up to 200 times as much memory."""
LEAD = 1 << 11
"""Characters on either side of a cut by which it is judged."""
TRIES = 16
"""Places for a cut that are judged in each PART, of at most TRIES parts."""
_PLACES = re.compile(r"(?<=\S)(?=\s\S)|(?<=\W)(?=\S)")
"""Before a word and its space, behind a space, and after punctuation: where tokens usually begin."""


class Tokenizer(Protocol):
    name: str
    vocab: int
    end: int | None
    """Put after every document."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without `end`; integers of any type."""
        ...

    def files(self) -> dict[str, bytes]:
        """Its own files: what decoding needs, by name."""
        ...


class Bytes:
    """UTF-8's bytes; documents end with a NUL, which text has no use for."""

    name, vocab = "bytes", 256

    def __init__(self, end: str = "auto") -> None:
        if end not in ("auto", "none"):
            raise ConfigError(f"--end {end} is not known to bytes: leave it out for NUL, or set it to none")
        self.end = None if end == "none" else 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def files(self) -> dict[str, bytes]:
        return {}


class Subwords:
    """A `tokenizers.Tokenizer`. Special tokens in the text are text: nobody ends a document by writing so."""

    name = "tokenizer.json"

    def __init__(self, inner: HfTokenizer, end: str = "auto", sides: dict[str, bytes] | None = None) -> None:
        self._inner, self._sides = inner, sides or {}
        inner.no_truncation()  # many files ask for 512 tokens, and would drop the rest without a word
        inner.no_padding()
        inner.encode_special_tokens = True
        ids = inner.get_vocab(with_added_tokens=True)
        self.vocab = max(ids.values()) + 1
        self.end = _end(ids, end)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        short = iter(self._whole([text for text in texts if len(text) <= PART]))
        return [next(short) if len(text) <= PART else self._in_parts(text) for text in texts]

    def _whole(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _in_parts(self, text: str) -> np.ndarray:
        """The ids of the whole, without the memory for that. Each part is encoded behind what leads to it, so that nothing is
        put before it that belongs before a text."""
        found: list[np.ndarray] = []
        at = 0
        while at < len(text):
            stop = self._cut(text, at)
            begin = max(at - LEAD, 0)
            lead, both = self._whole([text[begin:at], text[begin:stop]])
            known = len(lead) if at else 0
            if not np.array_equal(both[:known], lead[:known]):  # what comes after the cut reaches further than LEAD
                return self._whole([text])[0]
            found.append(both[known:])
            at = stop
        return np.concatenate(found)

    def _cut(self, text: str, at: int) -> int:
        """Where the part that begins at `at` ends: at a cut that changes nothing, or the text's end if none is found."""
        for begin in range(at + PART, min(at + (TRIES + 1) * PART, len(text)), PART):
            for place in islice(_PLACES.finditer(text, begin, begin + PART), TRIES):
                if self._changes_nothing(text, place.start()):
                    return place.start()
        return len(text)

    def _changes_nothing(self, text: str, cut: int) -> bool:
        """Whether the ids before the cut are the same without what follows, and those behind it wherever one begins to read."""
        begin, rests = max(cut - LEAD, 0), []
        for start in (begin, begin + 1):
            left, both = self._whole([text[start:cut], text[start : cut + LEAD]])
            if not np.array_equal(both[: len(left)], left):
                return False
            rests.append(both[len(left) :])
        return np.array_equal(rests[0], rests[1])

    def files(self) -> dict[str, bytes]:
        return {self.name: self._inner.to_str().encode(), **self._sides}


def _end(ids: dict[str, int], end: str) -> int | None:
    if end == "none":
        return None
    known = [token for token in (ENDS if end == "auto" else (end,)) if token in ids]
    if not known:
        wanted = f"none of {' '.join(ENDS)}" if end == "auto" else f"no {end}"
        raise ConfigError(
            f"--end {end}: the tokenizer has {wanted} to put after each document: name one of its tokens, or none"
        )
    return ids[known[0]]


def load(spec: str, end: str = "auto") -> Tokenizer:
    """spec: `bytes`, a tokenizer.json, or a directory with one or with GPT-2's two files. Raises ConfigError."""
    if spec == "bytes":
        return Bytes(end)
    path = Path(spec).expanduser()
    whole = path / "tokenizer.json" if path.is_dir() else path
    pairs = [[path / name for name in pair] for pair in GPT2]
    try:
        if whole.is_file():
            sides = {name: whole.with_name(name).read_bytes() for name in SIDES if whole.with_name(name).is_file()}
            return Subwords(HfTokenizer.from_file(str(whole)), end, sides)
        for pair in pairs:
            if all(file.is_file() for file in pair):
                return Subwords(_gpt2(*pair), end)
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises that
        raise ConfigError(f"--tokenizer {spec} cannot be read ({error}): is it one of Hugging Face's?") from error
    raise ConfigError(
        f"--tokenizer {spec} is not there: set it to bytes, a tokenizer.json, or a directory with one or with "
        "GPT-2's encoder.json and vocab.bpe"
    )


def _gpt2(vocab: Path, merges: Path) -> HfTokenizer:
    """GPT-2's byte-level BPE (Radford et al. 2019)."""
    tokenizer = HfTokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return tokenizer
