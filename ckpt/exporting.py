"""A checkpoint's θ as a folder that `transformers` loads as a LlamaForCausalLM. Streams: needs memory for a few blocks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckpt import llama
from ckpt.errors import RequestError
from ckpt.format import ITEM, encode_header
from ckpt.layout import Theta, ThetaDigest
from ckpt.reading import verify
from ckpt.store import Store

DTYPES = {"fp32": ("F32", torch.float32), "bf16": ("BF16", torch.bfloat16)}
"""--dtype -> safetensors' and torch's names."""
MAX_FILE = 2 << 30
"""Bytes of a safetensors file, unless one tensor alone has more."""
INDEX = "model.safetensors.index.json"


def export(store: Store, manifest: dict[str, Any], out: str, dtype: str) -> Iterator[str]:
    """Write the folder `out`; it appears whole or not at all. Yields a line a file, at last the digest of θ.

    RequestError if `out` exists or the checkpoint is of no Llama, DamagedError if a byte of it is not right: all are read
    once before, so that nothing damaged is ever exported.
    """
    if os.path.lexists(out):
        raise RequestError(f"OUT={out} exists: name a folder that does not")
    shape, theta = llama.shape_of(manifest["model"]), Theta(store, manifest)
    parameters = list(llama.parameters(shape))
    _check(theta, parameters)
    verify(store, manifest)
    code, torch_dtype = DTYPES[dtype]
    files, digest = plan(parameters, ITEM[code]), ThetaDigest()
    with _appearing(Path(out)) as folder:
        for name, group in files.items():
            with (folder / name).open("xb") as file:
                file.write(encode_header([(p.theirs, code, p.shape) for p in group]))
                for parameter in group:
                    for flat in _blocks(theta, parameter, shape.head_dim, digest):
                        file.write(flat.to(torch_dtype).view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
                yield f"{name} · {len(group)} tensors · {file.tell() / 1e6:,.1f} MB"
        _write_json(folder / INDEX, index(files, ITEM[code]))
        name = str(torch_dtype).removeprefix("torch.")
        _write_json(folder / "config.json", llama.to_config(shape, manifest["model"]["seq_len"], name))
    yield f"θ {digest.hexdigest()}"


def _check(theta: Theta, parameters: Sequence[llama.Parameter]) -> None:
    ours = {name: slot.shape for name, slot in theta.slots.items()}
    theirs = {parameter.name: parameter.shape for parameter in parameters}
    if wrong := [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]:
        raise RequestError(
            f"{wrong[0]} has the shape {ours.get(wrong[0])} here and {theirs.get(wrong[0])} in a Llama of model.args: "
            "only unchanged Llamas can be exported"
        )


def plan(parameters: Sequence[llama.Parameter], item: int) -> dict[str, list[llama.Parameter]]:
    """File name -> its tensors, in the model's order; item: bytes of an element."""
    groups, size = list[list[llama.Parameter]](), 0
    for parameter in parameters:
        own = item * prod(parameter.shape)
        if not groups or size + own > MAX_FILE:
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += own
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def index(files: dict[str, list[llama.Parameter]], item: int) -> dict[str, Any]:
    """What model.safetensors.index.json says."""
    where = {parameter.theirs: name for name, group in files.items() for parameter in group}
    total = sum(item * prod(parameter.shape) for group in files.values() for parameter in group)
    return {"metadata": {"total_size": total}, "weight_map": where}


def _blocks(theta: Theta, parameter: llama.Parameter, head_dim: int, digest: ThetaDigest) -> Iterator[Tensor]:
    """Flat fp32 blocks as Hugging Face has them; the digest is of what they are here."""
    columns = parameter.shape[-1]
    for flat in theta.blocks(parameter.name, granule=head_dim * columns if parameter.rotary else 1):
        digest.update(parameter.name, parameter.shape, flat)
        yield llama.to_halves(flat.view(-1, columns), head_dim).flatten() if parameter.rotary else flat


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if all goes well, and is removed otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.{os.getpid()}.part"
    folder.mkdir()
    try:
        yield folder
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
