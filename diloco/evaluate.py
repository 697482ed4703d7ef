"""What the global parameters are evaluated on, and their loss there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from diloco.data import DataConfig, Dataset, TokenSource
from diloco.errors import ConfigError
from diloco.inner import Loss
from diloco.metrics import HELD_OUT
from diloco.mixing import Samples, check_like_data, index_of, naming, source_of
from diloco.parallel import Region

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def build_eval_sets(cfg: DataConfig, sets: Sequence[Any], samples: Samples, seq_len: int) -> dict[str, Samples]:
    """What to evaluate on, by name: what `samples` keep back, if anything, and `run.eval_sets`. Raises ConfigError."""
    found: dict[str, Samples] = {HELD_OUT: samples} if samples.heldout_windows else {}
    for k, own in enumerate(sets):
        key = f"run.eval_sets[{k}]"
        name = own.get("name") if isinstance(own, Mapping) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == HELD_OUT or name in found:
            raise ConfigError(
                f"{key}={own} has no name of its own: write it as {{name: books, path: DIR}}, not as {HELD_OUT}"
            )
        one, source = source_of(cfg, key, {"holdout": 0.0, **{k: v for k, v in own.items() if k != "name"}})
        if not one.holdout and getattr(source, "heldout", None) is None:
            source = Whole(source)
        check_like_data(f"{key} ({name})", source, samples.source)
        with naming(key):
            found[name] = Dataset(source, seq_len, one.holdout, 0)
            if not found[name].heldout_windows:
                raise ConfigError(
                    f"inner.seq_len={seq_len} is too long for what it holds out, which is less than one sequence: give more "
                    "data, or set a shorter inner.seq_len"
                )
    return found


class Whole:
    """A source that nobody trains on: all of it is held out."""

    def __init__(self, source: TokenSource) -> None:
        self.vocab, self.bytes_per_token, self.index = source.vocab, source.bytes_per_token, index_of(source)
        self.tokens = self.heldout = source.tokens
        self._source = source

    @property
    def digest(self) -> str:
        return self._source.digest


@torch.no_grad()
def evaluate(
    model: nn.Module, loss: Loss, dataset: Samples, region: Region, sequences: int, micro_batch: int
) -> tuple[float, int]:
    """Mean nll (nats per token) of the model as it is over held-out sequences, and how many tokens that is: the same sequences
    for any number of ranks, spread over all, as the bytes per token are of all. Every rank takes part in every forward: who has
    no sequence left does with one that does not count. micro_batch: sequences per rank and forward; those of training need no
    more memory than training. Collective."""
    wanted = min(sequences, dataset.heldout_windows)
    per_rank = -(-wanted // region.dp)
    mine = range(wanted)[region.dp_rank * per_rank : (region.dp_rank + 1) * per_rank]
    total = torch.zeros((), dtype=torch.float64)
    tokens = 0
    model.eval()
    for at in range(0, per_rank, micro_batch):
        now = mine[at : at + micro_batch]
        windows = [torch.from_numpy(dataset.heldout(i, wanted)) for i in now or range(1)]
        batch = torch.stack(windows).to(region.device)
        _, nll = loss(model, batch)
        counted = len(now) * (batch.shape[1] - 1)
        tokens += counted
        total += nll.double().cpu() * counted
    if isinstance(model, FSDPModule):
        model.reshard()  # FSDP2 leaves the root gathered for a backward: the next forward would not see what is written
    model.train()
    sums = region.all_reduce_sum(torch.stack([total, torch.tensor(float(tokens), dtype=torch.float64)]))
    return (sums[0] / sums[1]).item(), int(sums[1].item()) // region.tp
