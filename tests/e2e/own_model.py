"""A language model of another family, its loss and its data, by dotted path: what a user might bring along."""

from __future__ import annotations

import ctypes
import hashlib
import time

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from diloco.data import DataConfig
from diloco.model import next_token_loss


class Gru(nn.Module):
    """Residual GRUs. No attention, no plan, parameters of one to two dimensions, biases."""

    def __init__(self, vocab: int, dim: int, layers: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, dim), nn.Linear(dim, vocab)
        self.layers = nn.ModuleList(nn.GRU(dim, dim, batch_first=True) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.head(x)


def smooth_loss(model: nn.Module, tokens: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross entropy with label smoothing to differentiate, and without it to report."""
    logits, targets = model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    return F.cross_entropy(logits, targets, label_smoothing=smoothing), F.cross_entropy(logits, targets).detach()


def slow_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The default one, in steps that leave a save its time."""
    time.sleep(0.1)
    return next_token_loss(model, tokens)


def failing_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("this loss was never meant to be")


def stuck_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """An inner step inside a native call that does not end, and that no signal interrupts: a mutex locked twice."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    print("stuck", flush=True)
    libc.pthread_mutex_lock(mutex)
    raise AssertionError("nobody ended this process")


class Counting:
    """Numbers one after the other, written out in digits: `data.args.digits` of them in every number."""

    vocab, bytes_per_token = 10, 1.0

    def __init__(self, cfg: DataConfig) -> None:
        digits = int(cfg.args["digits"])
        text = "".join(f"{number:0{digits}d}" for number in range(10**digits))
        self.tokens = np.frombuffer(text.encode(), dtype=np.uint8) - ord("0")
        self.digest = hashlib.sha256(self.tokens.tobytes()).hexdigest()
