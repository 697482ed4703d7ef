"""A plan's arithmetic: golden values by hand, and that it says what training, codecs and exchange do."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.codec import CODECS
from diloco.fragments import BLOCK, group_parameters
from diloco.model import build_llama, next_token_loss
from elastic.plan import WHOLE, ownership
from launch.advising import candidates, needed, recommend, scaled, sweep, ways
from launch.planning import (
    Site,
    Way,
    Work,
    activation_bytes,
    budget,
    checkpoint,
    join,
    memory,
    outlook,
    step_seconds,
    traffic,
)
from launch.simulating import Schedule

MBIT = 1e6 / 8
SHAPES = (("embed.weight", (256, 512)), *((f"layers.{i}.w", (512, 2048)) for i in range(8)))
WORK = Work(
    SHAPES,
    {f"layers.{i}.w": i for i in range(8)},
    flops=6.0 * 8_519_680,
    seq_len=1024,
    micro_batch=0,
    width=2,
    activations=1000.0,
)
EU = Site("eu", gpus=8, peak=100e12, mfu=0.5, memory=80e9, up=100 * MBIT, down=200 * MBIT, batch=64)
US = replace(EU, name="us", up=50 * MBIT, down=400 * MBIT)


def test_a_step_takes_its_flops() -> None:
    assert step_seconds(EU, WORK) == pytest.approx(64 * 1024 * 6 * 8_519_680 / (8 * 100e12 * 0.5))


def test_intellect_1s_step() -> None:
    """100 steps of 128 sequences of 8192 tokens took 38 minutes on 8 H100 (arXiv 2412.01152), so at an MFU of 0.455."""
    flops = 6 * 10.2e9 + 12 * 42 * 4096 * 8192
    node = Site("n", 8, 989e12, 0.455, 80e9, 1.0, 1.0, 128)
    assert 100 * step_seconds(node, replace(WORK, flops=flops, seq_len=8192)) == pytest.approx(38 * 60, rel=0.02)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("fragments", [1, 3, 8])
def test_encoded_bytes_are_those_of_the_codec(codec: str, fragments: int) -> None:
    grouped = group_parameters(SHAPES, dict(WORK.layers), fragments)
    real = [CODECS[codec].encode(torch.randn(f.elements), f.block).numel() for f in grouped]
    assert Way(Schedule(24, fragments), codec).encoded(WORK) == real


def test_a_round_between_two() -> None:
    """int8 of both, at the slower line: 50 Mbit/s up; eu stores the bits at 100 Mbit/s first."""
    n = CODECS["int8"].size(WORK.count, BLOCK)
    found = traffic([EU, US], n, "int8", rtt=0.1, durable=True)
    assert found.stored == pytest.approx(n / (100 * MBIT))
    assert found.seconds == pytest.approx(n / (50 * MBIT) + found.stored + 0.35)
    assert found.up == pytest.approx((2 * n, n)) and found.down == pytest.approx((n, n))
    assert traffic([EU, US], n, "int8", 0.1, durable=False).seconds == pytest.approx(n / (50 * MBIT) + 0.35)


def test_sparse_contributions_go_to_everyone() -> None:
    n = CODECS["topk"].size(WORK.count, BLOCK)
    found = traffic([EU, US, replace(US, name="asia")], n, "topk", rtt=0.0, durable=True)
    assert found.up == pytest.approx((2 * n, 2 * n, 5 * n))  # asia, the first by name, stores all three
    assert found.seconds == pytest.approx(2 * n / (50 * MBIT) + 3 * n / (50 * MBIT))


def test_one_region_exchanges_nothing() -> None:
    found = traffic([EU], 1e9, "int8", rtt=0.1, durable=False)
    assert (found.seconds, found.up, found.down) == (0.0, (0.0,), (0.0,))


@settings(deadline=None)
@given(st.lists(st.floats(1.0, 1000.0), min_size=2, max_size=6), st.sampled_from(sorted(CODECS)))
def test_what_is_sent_is_received(rates: list[float], codec: str) -> None:
    sites = [replace(EU, name=f"r{k}", up=rate * MBIT, down=rate * MBIT) for k, rate in enumerate(rates)]
    found = traffic(sites, 1e6, codec, rtt=0.0, durable=False)
    assert sum(found.up) == pytest.approx(sum(found.down))
    assert found.seconds >= max(size / (rate * MBIT) for size, rate in zip(found.up, rates, strict=True)) * (1 - 1e-9)
    if not CODECS[codec].gathers:
        shares = ownership([site.rate for site in sites])
        k = len(sites)
        assert found.up == pytest.approx([1e6 * ((1 - o / WHOLE) + (k - 1) * o / WHOLE) for o in shares])


def test_memory_of_a_rank() -> None:
    n = WORK.count
    gpu, host = memory(EU, WORK, Way(Schedule(24), "int8"), members=2)
    assert gpu["fp32 parameters"] + gpu["gradients"] + gpu["AdamW's moments"] == pytest.approx(16 * n / 8)
    assert gpu["FSDP's largest module"] == 512 * 2048 * (2 + 2 + 4)
    assert gpu["activations and logits"] == 1000 * 8 * 1024  # 64 sequences on 8 ranks
    assert host["θ and outer moments"] == pytest.approx(8 * n / 8)
    assert host["checkpoint arena"] == pytest.approx(20 * n / 8)
    assert "error feedback" not in host
    fed = memory(EU, replace(WORK, feedback=True), Way(Schedule(24), "topk"), members=2)[1]
    assert fed["error feedback"] == pytest.approx(4 * n / 8) and fed["checkpoint arena"] == pytest.approx(24 * n / 8)
    assert "FSDP's largest module" not in memory(replace(EU, gpus=1), WORK, Way(Schedule(24), "int8"), 2)[0]


@pytest.mark.parametrize("tied", [False, True])
def test_activations_are_what_autograd_keeps(tied: bool) -> None:
    """Counted in a forward of a real model in fp32, as tests.bench.inner does, and two gradients of the logits."""
    shape = {"vocab": 512, "dim": 128, "layers": 3, "heads": 8, "kv_heads": 2, "ffn": 384, "tied": tied}
    model, tokens, seen = build_llama(**shape), torch.randint(0, 512, (2, 65)), dict[int, int]()
    weights = {p.shape for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if whole.shape not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        next_token_loss(model, tokens)
    counted = sum(seen.values()) / 128 + 2 * 4 * 512
    assert activation_bytes(128, 3, 32, 384, 512, width=4) == pytest.approx(counted, rel=0.1)


def test_what_spares_activations() -> None:
    whole = activation_bytes(4096, 42, 1024, 14336, 128256, 2)
    assert activation_bytes(4096, 42, 1024, 14336, 128256, 2, tp=4) < whole
    assert activation_bytes(4096, 42, 1024, 14336, 128256, 2, again=True) < whole / 3


def test_checkpoints_and_joining() -> None:
    n = WORK.count
    assert checkpoint(US, WORK, 2) == pytest.approx((4 * n + 12 * n, 16 * n / (50 * MBIT)))
    assert join(US, [EU], WORK) == pytest.approx(16 * n / (100 * MBIT))  # eu's uplink
    several = [EU, replace(EU, name="asia")]
    assert join(US, several, WORK) == pytest.approx(8 * n / (200 * MBIT) + 8 * n / (100 * MBIT))
    assert join(US, several, replace(WORK, moments=False)) == pytest.approx(8 * n / (200 * MBIT))
    assert join(US, [], WORK) == pytest.approx(20 * n / (400 * MBIT))


def test_the_budget_that_ends_first() -> None:
    assert budget(replace(WORK, tokens=1000), 10.0, 1.0) == 100
    assert budget(replace(WORK, tokens=1000, rounds=20), 10.0, 1.0) == 20
    assert budget(WORK, 10.0, 1.0) is None


def test_an_outlook_by_hand() -> None:
    """24 steps, then a round."""
    work, way = replace(WORK, tokens=24 * 128 * 1024 * 10, durable=False), Way(Schedule(24), "int8")
    found = outlook("x", [EU, US], work, way, rtt=0.1)
    cycle = 24 * step_seconds(EU, work) + found.seconds
    assert found.bound == pytest.approx(24 * step_seconds(EU, work) / cycle)
    assert found.run_seconds == pytest.approx(10 * cycle) and found.run_rounds == pytest.approx(10)
    assert found.up == pytest.approx((found.bytes, found.bytes))


def test_ways_differ_in_waiting_only() -> None:
    compared = ways(Way(Schedule(100), "int8"), layers=8)
    assert [way.codec for way in compared.values()] == ["int8"] * 4
    assert [(w.schedule.fragments, w.schedule.overlap) for w in compared.values()] == [(1, 0), (1, 0), (4, 0), (4, 5)]
    kept = ways(Way(Schedule(99, 3, 2), "int4"), layers=8)
    assert [(w.schedule.fragments, w.schedule.overlap) for w in kept.values()] == [(3, 2), (1, 0), (3, 0), (3, 2)]
    assert ways(Way(Schedule(1), "none"), layers=8)["overlapped"].schedule == Schedule(1, 1, 1)


@pytest.mark.parametrize("layers", [0, 1, 3, 42])
def test_candidates_are_valid_settings(layers: int) -> None:
    for way in candidates(layers):
        s = way.schedule
        assert s.sync_every % s.fragments == 0 and s.overlap <= s.sync_every and s.fragments <= max(layers, 1)


@settings(deadline=None, max_examples=15)
@given(st.floats(0.5, 5000.0), st.floats(0.5, 0.99))
def test_a_recommendation_reaches_its_target_or_says_that_none_does(mbit: float, target: float) -> None:
    sites = scaled([EU, US], mbit * MBIT)
    found = recommend(sites, WORK, 0.05, target)
    reached = [way for way in candidates(8) if outlook("", sites, WORK, way, 0.05).bound >= target]
    assert found.enough == bool(reached) == (found.outlook.bound >= target)
    if reached:
        assert found.outlook.way == reached[0]
        assert found.rate is not None and found.rate <= mbit * MBIT * 1.01


def test_the_needed_rate_suffices_and_less_does_not() -> None:
    way = Way(Schedule(100), "int8")
    rate = needed([EU, US], WORK, way, 0.0, 0.8)
    assert rate is not None
    assert outlook("", scaled([EU, US], rate), WORK, way, 0.0).bound >= 0.8
    assert outlook("", scaled([EU, US], rate / 1.05), WORK, way, 0.0).bound < 0.8


def test_a_sweep_rises_with_the_rate_and_data_parallelism_is_below_all() -> None:
    lines = {line.name: line.utilization for line in sweep([EU, US], WORK, ways(Way(Schedule(100), "int8"), 8), 0.0)}
    for values in lines.values():
        assert all(b >= a - 1e-9 for a, b in itertools.pairwise(values)) and values[0] > 0
    for name in ("configured", "blocking", "streaming", "overlapped"):
        assert all(ours > theirs for ours, theirs in zip(lines[name], lines["data parallel"], strict=True)), name
    assert math.isclose(lines["configured"][0], lines["blocking"][0])
