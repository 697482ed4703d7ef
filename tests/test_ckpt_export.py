"""Exports against transformers' own LlamaForCausalLM, and back: the same logits, the same θ bit for bit."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

import ckpt.format
import ckpt.reading
from ckpt import exporting, layout, llama, pieces
from ckpt.checkpoint import load_manifest
from ckpt.errors import RequestError
from ckpt.exporting import export
from ckpt.importing import Folder, import_
from ckpt.layout import Theta
from ckpt.store import Store
from diloco.fragments import Fragment, block_digests, digest
from diloco.model import LlamaArgs, build_llama
from tests.llama_checkpoints import GROUPED, SMALL, TINY, random_llama, save_llama

CONFIGS = Path(__file__).parent.parent / "configs" / "model"
MODELS = {"tiny": TINY, "grouped": GROUPED, "15m": yaml.safe_load((CONFIGS / "15m.yaml").read_text())["args"]}


def export_llama(tmp_path: Path, model: Any, dtype: str = "fp32") -> tuple[Path, str]:
    """The folder, and the digest of θ."""
    store, out = Store(str(tmp_path / "store")), tmp_path / "hf"
    return out, last(export(store, save_llama(store, model), str(out), dtype))


def last(lines: Iterable[str]) -> str:
    return list(lines)[-1]


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    transformers = pytest.importorskip("transformers", reason="exports are proven with it: pip install transformers")
    model, said = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(exporting, "MAX_FILE", 1 << 20)  # several files
    model = random_llama(MODELS[name])
    tokens = torch.randint(0, MODELS[name]["vocab"], (2, 40), generator=torch.Generator().manual_seed(1))
    ours = model(tokens)
    theirs = logits_of(export_llama(tmp_path, model)[0], tokens)
    assert ours.std() > 0.3, "small logits would agree whatever they come from"
    assert (ours - theirs).abs().max() <= 1e-4


@torch.no_grad()
def test_without_the_change_of_rows_the_logits_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the proof sees a wrong RoPE."""
    monkeypatch.setattr(llama, "to_halves", lambda rows, head_dim: rows)
    model, tokens = random_llama(GROUPED), torch.arange(40)[None]
    assert (model(tokens) - logits_of(export_llama(tmp_path, model)[0], tokens)).abs().max() > 0.05


@torch.no_grad()
def test_a_folder_of_transformers_comes_in(tmp_path: Path) -> None:
    """Written by transformers itself, not by our export."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        rope_theta=3000.0,
        max_position_embeddings=77,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    store, tokens = Store(str(tmp_path / "store")), torch.arange(50)[None]
    list(import_(Folder(str(tmp_path / "hf")), store))
    manifest = imported(store)
    assert manifest["model"]["seq_len"] == 77
    ours = build_llama(**manifest["model"]["args"])
    ours.load_state_dict(parameters_of(store, manifest))
    assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 1e-4


def imported(store: Store) -> dict[str, Any]:
    return load_manifest(store, "checkpoints/import/0")


def parameters_of(store: Store, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    theta = Theta(store, manifest)
    return {name: torch.cat(list(theta.blocks(name))).view(slot.shape) for name, slot in theta.slots.items()}


@pytest.mark.parametrize(("args", "block"), [(SMALL, 64), (GROUPED, 1000), (TINY, 1 << 22)])
def test_there_and_back_is_the_same_theta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: dict[str, Any], block: int
) -> None:
    """Whatever the sizes of blocks, shards and files are. The digest is the journal's, too, for one fragment."""
    monkeypatch.setattr(layout, "BLOCK", block)
    monkeypatch.setattr(pieces, "SHARD", 30_000)
    monkeypatch.setattr(exporting, "MAX_FILE", 5_000)
    model = random_llama(args)
    out, said = export_llama(tmp_path, model)
    store = Store(str(tmp_path / "imported"))
    assert last(import_(Folder(str(out)), store)) == said
    manifest = imported(store)
    assert last(export(store, manifest, str(tmp_path / "again"), "fp32")) == said
    assert len(list(out.iterdir())) > 3
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    named = dict(model.named_parameters())
    assert list(Theta(store, manifest).slots) == list(named), "the model's own order: a run can start from it"
    flat = torch.cat([p.detach().flatten() for p in named.values()])
    theirs = torch.cat([p.flatten() for p in parameters_of(store, manifest).values()])
    assert digest(block_digests(flat, Fragment.block)) == digest(block_digests(theirs, Fragment.block))
    with torch.no_grad():
        named["layers.1.attention.wk.weight"][3, 5] += 1e-3
    (tmp_path / "other").mkdir()
    assert export_llama(tmp_path / "other", model)[1] != said


def test_bf16_is_theta_rounded(tmp_path: Path) -> None:
    model = random_llama(SMALL)
    out, said = export_llama(tmp_path, model, "bf16")
    config = json.loads((out / "config.json").read_text())
    index = json.loads((out / exporting.INDEX).read_text())
    tensors = {k: v for file in out.glob("*.safetensors") for k, v in safetensors.torch.load_file(file).items()}
    assert config["torch_dtype"] == "bfloat16" and index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in tensors.values())
    named = dict(model.named_parameters())
    assert torch.equal(tensors["model.embed_tokens.weight"], named["embed.weight"].bfloat16())
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], named["layers.1.ffn.w2.weight"].bfloat16())
    assert said == export_llama(tmp_path / "fp32", model)[1], "the digest is of θ, not of what was rounded"


@pytest.mark.parametrize("name", ["tiny", "15m", "150m", "1b", "10b"])
def test_the_table_is_the_model(name: str) -> None:
    args = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["args"]
    with torch.device("meta"):
        model = build_llama(**args)
    shape = llama.shape_of({"target": llama.TARGET, "args": vars(model.args)})
    expected = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert [(p.name, p.shape) for p in llama.parameters(shape)] == expected
    assert [f.name for f in fields(llama.Shape)] == [f.name for f in fields(LlamaArgs)]
    assert llama.from_config(llama.to_config(shape, 99, "float32")) == (shape, 99)


def test_files_hold_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "MAX_FILE", 100)
    sizes = [10, 15, 1, 60, 25, 1]  # of 4 bytes: 40 60 | 4 | 240 | 100 | 4
    parameters = [llama.Parameter(str(i), str(i), (n,)) for i, n in enumerate(sizes)]
    files = exporting.plan(parameters, 4)
    assert [[p.shape[0] for p in group] for group in files.values()] == [[10, 15], [1], [60], [25], [1]]
    assert next(iter(files)) == "model-00001-of-00005.safetensors"


def test_an_export_needs_memory_for_some_blocks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's memory is not Python's, so the blocks are counted instead: none is larger than asked for."""
    monkeypatch.setattr(layout, "BLOCK", 5000)
    for module in (ckpt.format, ckpt.reading):
        monkeypatch.setattr(module, "CHUNK", 64 << 10)
    store = Store(str(tmp_path / "store"))
    manifest, sizes, read = save_llama(store, random_llama(TINY)), list[int](), Store.view

    def counted(self: Store, key: str, start: int, stop: int) -> memoryview:
        sizes.append(stop - start)
        return read(self, key, start, stop)

    monkeypatch.setattr(exporting, "verify", lambda store, manifest: None)  # reads with threads
    monkeypatch.setattr(Store, "view", counted)
    tracemalloc.start()
    list(export(store, manifest, str(tmp_path / "hf"), "fp32"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 4_000_000 < sum(sizes) < 20_000_000 and max(sizes) <= 64 << 10
    assert peak < 1_000_000


def test_what_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "store"))
    manifest = save_llama(store, random_llama(SMALL))
    monkeypatch.setattr(exporting, "_write_json", lambda path, value: path.mkdir() or path.rmdir() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(export(store, manifest, str(tmp_path / "hf"), "fp32"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def edited(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def without(folder: Path, name: str) -> None:
    path = folder / exporting.INDEX
    index = json.loads(path.read_text())
    del index["weight_map"][name]
    path.write_text(json.dumps(index))


def truncated(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])


STRETCHED = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}
BAD = {
    "config.json cannot be read": lambda f: (f / "config.json").unlink(),
    "config.json is not a JSON object": lambda f: (f / "config.json").write_text("[]"),
    "model_type='gpt2' is not llama": lambda f: edited(f, model_type="gpt2"),
    "rope_type='llama3', and our Llama has 'default'": lambda f: edited(f, rope_parameters=STRETCHED),
    "head_dim=64, and our Llama has 8": lambda f: edited(f, head_dim=64),
    "attention_bias=True": lambda f: edited(f, attention_bias=True),
    "hidden_size='16' is no size": lambda f: edited(f, hidden_size="16"),
    "vocab_size=None is no size": lambda f: edited(f, vocab_size=None),
    "do not split into 3 heads": lambda f: edited(f, num_attention_heads=3),
    "max_position_embeddings=0 is no length": lambda f: edited(f, max_position_embeddings=0),
    r"is F32 \[32, 16\], and config.json makes it \[64, 16\]": lambda f: edited(f, vocab_size=64),
    "has no tensor model.layers.2.input_layernorm.weight": lambda f: edited(f, num_hidden_layers=3),
    "has no tensor model.norm.weight": lambda f: without(f, "model.norm.weight"),
    "is no tensor of a Llama": lambda f: edited(f, num_hidden_layers=1),
    "has no weight_map": lambda f: (f / exporting.INDEX).write_text('{"weight_map": {"x": "../x.safetensors"}}'),
    "model.safetensors cannot be read": lambda f: (f / exporting.INDEX).unlink(),
    "of-00001.safetensors cannot be read": truncated,
}


@pytest.mark.parametrize("sentence", BAD)
def test_a_bad_folder_is_one_sentence_and_nothing_is_written(tmp_path: Path, sentence: str) -> None:
    out, _ = export_llama(tmp_path, random_llama(SMALL))
    BAD[sentence](out)
    store = Store(str(tmp_path / "imported"))
    with pytest.raises(RequestError, match=sentence):
        list(import_(Folder(str(out)), store))
    assert store.list() == []
