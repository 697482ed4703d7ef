"""Text to token ids: bytes, or any tokenizer of Hugging Face's `tokenizers`, GPT-2's two files included."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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
"""Characters that a long document is cut at for tokenizing."""
_CUT = re.compile(r"(?<=\n)(?=\S)")


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
        parts = [list(cut(text)) for text in texts]
        flat = self._inner.encode_batch_fast([p for ps in parts for p in ps], add_special_tokens=False)
        ids = iter([np.asarray(encoding.ids, dtype=np.uint32) for encoding in flat])
        return [np.concatenate([next(ids) for _ in ps]) for ps in parts]

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


def cut(text: str) -> Iterator[str]:
    """A text in parts of about PART characters, so that no tokenizer holds a book at once. Cut where a line begins with
    something to see: there GPT-2's and Llama's pre-tokenizers cut anyway, so the ids are those of the whole. A line
    that is longer than 16 parts is cut anywhere."""
    at = 0
    while len(text) - at > PART:
        found = _CUT.search(text, at + PART, at + 16 * PART)
        stop = found.start() if found else min(at + 16 * PART, len(text))
        yield text[at:stop]
        at = stop
    yield text[at:]


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
