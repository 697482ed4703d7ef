"""A Llama-family folder of Hugging Face as a checkpoint to start from: safetensors only, nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ckpt import llama
from ckpt.errors import RequestError
from ckpt.exporting import INDEX
from ckpt.format import is_name
from ckpt.layout import runs
from ckpt.making import Model, make
from ckpt.store import Store

WHOLE = "model.safetensors"
DTYPES = ("F32", "BF16", "F16")
"""What fp32 holds exactly."""


class Folder:
    """config.json and the tensors of a folder. Every method raises RequestError for what is missing or malformed."""

    def __init__(self, path: str):
        self.path, self._files = Path(path), dict[str, Any]()
        self.config = self._json("config.json")
        if (self.path / INDEX).exists():
            where = self._json(INDEX).get("weight_map")
            if not isinstance(where, dict) or not all(map(is_name, where.values())):
                raise self._wrong(INDEX, "has no weight_map of names of files in the folder")
            self._where = where
        else:
            self._where = dict.fromkeys(self._open(WHOLE).keys(), WHOLE)

    def names(self) -> set[str]:
        return set(self._where)

    def look(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape) of a tensor."""
        with self._reading(self._where[name]):
            tensor = self._open(self._where[name]).get_slice(name)
            return tensor.get_dtype(), tuple(tensor.get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, fp32."""
        with self._reading(self._where[name]):
            rows: Tensor = self._open(self._where[name]).get_slice(name)[start:stop]
            return rows.float()

    def _open(self, file: str) -> Any:
        if file not in self._files:
            with self._reading(file):
                self._files[file] = safe_open(self.path / file, framework="pt")
        return self._files[file]

    def _json(self, file: str) -> dict[str, Any]:
        with self._reading(file):
            value = json.loads((self.path / file).read_bytes())
        if not isinstance(value, dict):
            raise self._wrong(file, "is not a JSON object")
        return value

    @contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise self._wrong(file, f"cannot be read ({' '.join(str(error).split())[:200]})") from error

    def _wrong(self, file: str, what: str) -> RequestError:
        return RequestError(f"HF_FOLDER={self.path}: {file} {what}: name a folder that transformers loads as a Llama")


def import_(folder: Folder, store: Store) -> Iterator[str]:
    """Write the checkpoint, one fragment in the model's order. Yields what `make` does; RequestError if it is no Llama of
    ours."""
    shape, seq_len = llama.from_config(folder.config)
    parameters = {parameter.name: parameter for parameter in llama.parameters(shape)}
    _check(folder, list(parameters.values()))

    def blocks(name: str) -> Iterator[Tensor]:
        parameter = parameters[name]
        columns = prod(parameter.shape[1:])
        for start, stop in runs(prod(parameter.shape), shape.head_dim * columns if parameter.rotary else columns):
            rows = folder.rows(parameter.theirs, start // columns, stop // columns)
            yield (llama.to_pairs(rows, shape.head_dim) if parameter.rotary else rows).flatten()

    what = {"target": llama.TARGET, "args": vars(shape), "seq_len": seq_len}
    fragment = [(parameter.name, parameter.shape) for parameter in parameters.values()]
    yield from make(store, {"by": "import", "of": folder.path.name}, Model(what, [fragment]), blocks)


def _check(folder: Folder, parameters: list[llama.Parameter]) -> None:
    """All tensors are there, in the right shape, before anything is written; and no others."""
    names = folder.names()
    for parameter in parameters:
        if parameter.theirs not in names:
            raise RequestError(f"HF_FOLDER={folder.path} has no tensor {parameter.theirs}: name a folder that is whole")
        dtype, shape = folder.look(parameter.theirs)
        if dtype not in DTYPES or shape != parameter.shape:
            raise RequestError(
                f"HF_FOLDER={folder.path}: {parameter.theirs} is {dtype} {list(shape)}, and config.json makes it "
                f"{list(parameter.shape)}: name a folder of {', '.join(DTYPES)} that fits its config.json"
            )
    # Old exports hold RoPE's table, and some a tied head beside the embedding.
    known = {parameter.theirs for parameter in parameters} | {llama.HEAD[1]}
    if others := sorted(name for name in names - known if not name.endswith("rotary_emb.inv_freq")):
        raise RequestError(f"HF_FOLDER={folder.path}: {others[0]} is no tensor of a Llama: name another model")
