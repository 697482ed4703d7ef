"""Compression: exact against the numpy codecs, exact in size, local in its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diloco.codec import BUILDERS, CodecConfig, build_codec
from tests import reference

NAMES = list(BUILDERS)
CASES = [(name, "nearest") for name in NAMES] + [("int8", "stochastic"), ("int4", "stochastic")]
each_case = pytest.mark.parametrize(("codec", "rounding"), CASES)
FLOATS = st.floats(-(2.0**126), 2.0**126, width=32)
SIZES = [1, 2, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1800, 4096]
"""Around groups and blocks of 512, and not multiples of any vector width."""
few = st.integers(1, 1500)
seeds = st.integers(0, 2**32 - 1)


def gaussian(n: int, seed: int, wild: bool = False) -> np.ndarray:
    """Pseudo-gradient-like; wild: over sixty orders of magnitude, with zeros of both signs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    if wild:
        x *= 10.0 ** rng.integers(-44, 30, size=n) * rng.integers(0, 2, size=n)
    return x.astype(np.float32)


def encode(
    x: np.ndarray, block: int = 512, codec: str = "int8", rounding: str = "nearest", seed: int = 0, first: int = 0
) -> np.ndarray:
    built = build_codec(CodecConfig(codec, rounding))
    return built.encode(torch.from_numpy(x), block, seed, first).numpy()


def decode(data: np.ndarray, n: int, block: int = 512, codec: str = "int8") -> np.ndarray:
    return build_codec(CodecConfig(codec)).decode(torch.from_numpy(data), n, block).numpy()


def size(codec: str, n: int, block: int = 512) -> int:
    return build_codec(CodecConfig(codec)).size(n, block)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


# Against the reference


@each_case
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("wild", [False, True])
def test_equals_the_reference(codec: str, rounding: str, n: int, wild: bool) -> None:
    x = gaussian(n, seed=n, wild=wild)
    data = encode(x, 512, codec, rounding, seed=n, first=3)
    assert same_bits(data, reference.encode(codec, x, 512, rounding, n, 3))
    assert same_bits(decode(data, n, 512, codec), reference.decode(codec, data, n, 512))


@each_case
@given(hnp.arrays(np.float32, st.integers(1, 40), elements=FLOATS), st.sampled_from([64, 250, 512, 768]), few, seeds)
def test_equals_the_reference_on_any_floats(
    codec: str, rounding: str, head: np.ndarray, block: int, length: int, seed: int
) -> None:
    """Arbitrary values (subnormal ones too), repeated so that they meet groups and blocks everywhere, and each other."""
    x = np.resize(head, length)
    data = encode(x, block, codec, rounding, seed)
    assert same_bits(data, reference.encode(codec, x, block, rounding, seed))
    assert same_bits(decode(data, length, block, codec), reference.decode(codec, data, length, block))


@each_case
@pytest.mark.parametrize("n", [8192, 3 * 8192 + 4096 + 77])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_the_reference_in_whole_chunks(codec: str, rounding: str, n: int, ties: bool) -> None:
    """Chunks of 4096; ties: eleven magnitudes only, so that the largest have to be chosen by their place."""
    x = np.round(gaussian(n, 5) * 2).astype(np.float32) if ties else gaussian(n, 6)
    data = encode(x, 8192, codec, rounding, 7)
    assert same_bits(data, reference.encode(codec, x, 8192, rounding, 7))
    assert same_bits(decode(data, n, 8192, codec), reference.decode(codec, data, n, 8192))


def head_of(codec: str, n: int) -> int:
    """Bytes of a block's scales, or of a chunk's two magnitudes."""
    return {"int8": 4 * reference.groups(n), "int4": 2 * reference.groups(n, 64), "topk": 4}[codec]


@pytest.mark.parametrize("codec", ["int8", "int4", "topk"])
@given(st.binary(min_size=1, max_size=64), few, seeds)
def test_decode_equals_the_reference_on_any_bytes(codec: str, values: bytes, n: int, seed: int) -> None:
    """What arrives from elsewhere decodes alike too: -128, and indices that repeat or point beyond the end."""
    data = np.resize(np.frombuffer(values, np.uint8), size(codec, n)).copy()
    scales = np.abs(gaussian(n + 2, seed)).view(np.uint8)
    for start in range(0, n, 512):
        at, head = size(codec, start), head_of(codec, min(512, n - start))
        data[at : at + head] = scales[:head] if codec == "int8" else scales.reshape(-1, 4)[:, 2:].reshape(-1)[:head]
    assert same_bits(decode(data, n, codec=codec), reference.decode(codec, data, n, 512))


def test_golden_int8() -> None:
    """Scale 1 (absmax 127), half to even, little endian, scales before values."""
    x = np.array([127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.49, 126.6, 0.0], np.float32)
    values = np.array([127, -127, 0, 2, 2, 0, -2, 0, 127, 0], np.int8)
    data = encode(x)
    assert data.tobytes() == bytes.fromhex("0000803f") + values.tobytes()
    assert decode(data, len(x)).tolist() == [127.0, -127.0, 0.0, 2.0, 2.0, 0.0, -2.0, 0.0, 127.0, 0.0]


def test_golden_int4() -> None:
    """Scale 1 (absmax 7); element i in the low half of byte i, element i + 32 in the high half, 8 being zero."""
    x = np.zeros(40, np.float32)
    x[[0, 1, 2, 32, 39]] = [7, -7, 2.5, -3, 1]
    data = encode(x, codec="int4")
    assert data.tobytes() == bytes.fromhex("803f5f818a8888888898") + bytes([0x88]) * 24
    assert decode(data, 40, codec="int4")[[0, 1, 2, 32, 39]].tolist() == [7, -7, 2, -3, 1]


def test_golden_int4_scale_is_rounded_up() -> None:
    """1 / 7 = 0x3e124925 is between two bf16; the larger one is 0x3e13, so that 7 steps reach 1."""
    data = encode(np.ones(1, np.float32), codec="int4")
    assert data[:2].tobytes() == bytes.fromhex("133e")


def test_golden_topk() -> None:
    """65 of 66 are zero: 2 are kept of 66 elements, the magnitudes 1 and 4, at 3 and 65 (0x041)."""
    x = np.zeros(66, np.float32)
    x[[3, 65]] = [-1, 4]
    data = encode(x, codec="topk")
    assert data.tobytes() == bytes.fromhex("803f804003100406")
    assert np.array_equal(decode(data, 66, codec="topk"), x)


def test_golden_decode_rounds_once() -> None:
    """3 * fl(0.1) in fp32 is one rounding of the product: 0x3e99999a."""
    data = np.frombuffer(np.float32(0.1).tobytes() + bytes([3, 253, 0]), np.uint8).copy()
    got = decode(data, 3)
    assert got.view(np.uint32).tolist() == [0x3E99999A, 0xBE99999A, 0]


# Size and layout


@pytest.mark.parametrize("codec", NAMES)
@given(st.integers(0, 9000), st.sampled_from([250, 256, 512, 8192, 65536]))
def test_exact_size(codec: str, n: int, block: int) -> None:
    expected = sum(reference.SIZE[codec](min(block, n - start)) for start in range(0, n, block))
    built = build_codec(CodecConfig(codec))
    data = built.encode(torch.zeros(n), block)
    assert built.size(n, block) == expected == data.numel()
    assert data.dtype == torch.uint8
    back = built.decode(data, n, block)
    assert back.numel() == n and back.dtype == torch.float32


@pytest.mark.parametrize(
    ("codec", "expected"),
    [("none", 4.0), ("bf16", 2.0), ("int8", 1 + 4 / 256), ("int4", 34 / 64), ("topk", 116 / 4096)],
)
def test_bytes_per_parameter(codec: str, expected: float) -> None:
    assert size(codec, 10 * 65536, 65536) / (10 * 65536) == expected


@each_case
@given(n=few, seed=seeds)
def test_a_block_does_not_depend_on_its_neighbours(codec: str, rounding: str, n: int, seed: int) -> None:
    x, block = gaussian(n, seed, wild=True), 256
    cuts = range(0, n, block)
    parts = [encode(x[i : i + block], block, codec, rounding, seed, i // block) for i in cuts]
    whole = encode(x, block, codec, rounding, seed)
    assert same_bits(whole, np.concatenate(parts))
    back = [decode(p, min(block, n - i), block, codec) for p, i in zip(parts, cuts, strict=True)]
    assert same_bits(decode(whole, n, block, codec), np.concatenate(back))


# Errors


@each_case
@given(n=few, seed=seeds, wild=st.booleans())
@example(257, 1, True)
def test_error_is_within_a_scale(codec: str, rounding: str, n: int, seed: int, wild: bool) -> None:
    """Of the element's own group: half of it to the nearest, a whole one stochastically; the fp32 roundings (quotient,
    product) add at most 127 ulp of the scale."""
    if codec in ("none", "topk"):
        return
    x = gaussian(n, seed, wild)
    back = decode(encode(x, 512, codec, rounding, seed), n, codec=codec)
    group, steps = {"int8": (256, 127), "int4": (64, 7 / (1 + 2**-7)), "bf16": (1, 128)}[codec]
    for start in range(0, n, group):
        scale = max(np.abs(x[start : start + group]).max().astype(np.float64) / steps, 2.0**-130)
        error = np.abs(x[start : start + group].astype(np.float64) - back[start : start + group])
        assert error.max() <= scale * ((0.5 if rounding == "nearest" else 1) + 127 * 2.0**-22)


@given(seeds)
def test_topk_keeps_the_largest(seed: int) -> None:
    """And each at one of two magnitudes, which leave little of them: the squared error is a few hundredths."""
    x = gaussian(4096, seed)
    back = decode(encode(x, 4096, "topk"), 4096, 4096, "topk")
    kept = back != 0
    assert kept.sum() == 64 and np.abs(x[kept]).min() >= np.abs(x[~kept]).max()
    assert (np.sign(back[kept]) == np.sign(x[kept])).all() and len(np.unique(np.abs(back[kept]))) == 2
    assert np.square(x[kept] - back[kept]).sum() < 0.02 * np.square(x[kept]).sum()


def test_zero_stays_zero() -> None:
    x = np.zeros(700, np.float32)
    for codec in NAMES:
        assert not decode(encode(x, codec=codec), 700, codec=codec).any()
    x[300] = -1.0  # a zero group beside one that is not
    for codec in NAMES:
        back = decode(encode(x, codec=codec), 700, codec=codec)
        assert back[300] == pytest.approx(-1.0, rel=0.01) and np.count_nonzero(back) == 1


def test_a_group_too_small_for_a_scale_is_zero() -> None:
    """absmax / 127 underflows: values are zero, not what a division by zero would give."""
    x = np.full(256, 1e-44, np.float32)
    assert x.all() and not encode(x).any()


def test_a_subnormal_scale_wraps_nothing_around() -> None:
    """189 units / 127 rounds to a scale of one unit, of which 189 is 189: more than int8 holds."""
    x = np.full(256, 189 * 2.0**-149, np.float32)
    assert np.array_equal(decode(encode(x), 256), np.full(256, 127 * 2.0**-149, np.float32))


@given(seeds, st.integers(0, 1199))
def test_an_outlier_costs_its_own_group_only(seed: int, where: int) -> None:
    x = gaussian(1200, seed)
    before = decode(encode(x), 1200)
    x[where] = 1e6
    after = decode(encode(x), 1200)
    group = slice(where // 256 * 256, where // 256 * 256 + 256) if where < 1024 else slice(1024, 1200)
    outside = np.ones(1200, bool)
    outside[group] = False
    assert same_bits(before[outside], after[outside])
    assert after[where] == pytest.approx(1e6)
    assert np.count_nonzero(after[group]) == 1, "here everything else drowned"


@given(hnp.arrays(np.uint32, st.integers(1, 300)))
def test_no_compression_keeps_every_bit(bits: np.ndarray) -> None:
    """Not-a-number, signed zero and subnormal values included."""
    x = bits.view(np.float32)
    assert same_bits(decode(encode(x, 16, "none"), len(x), 16, "none"), x)


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 511, 512, 1299])
def test_what_is_not_finite_shows(codec: str, bad: float, where: int) -> None:
    x = gaussian(1300, seed=1)
    built = build_codec(CodecConfig(codec))
    assert built.finite(torch.from_numpy(encode(x, codec=codec)), 1300, 512)
    x[where] = bad
    assert not built.finite(torch.from_numpy(encode(x, codec=codec)), 1300, 512)


# Stochastic rounding


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_stochastic_rounding_is_unbiased(codec: str) -> None:
    """Mean over 1000 seeds: each element within six standard errors of itself, and all together within three."""
    x, runs = gaussian(512, seed=2), 1000
    decoded = [decode(encode(x, 512, codec, "stochastic", seed), 512, codec=codec) for seed in range(runs)]
    error = np.mean(np.stack(decoded, dtype=np.float64), 0) - x
    step = np.abs(x).max() / {"int8": 127, "int4": 7}[codec]
    assert np.abs(error).max() <= 6 * 0.5 * step / runs**0.5
    assert abs(error.mean()) <= 3 * 0.5 * step / (512 * runs) ** 0.5
    nearest = decode(encode(x, 512, codec), 512, codec=codec)
    assert np.abs(error).mean() < 0.1 * np.abs(nearest - x).mean(), "which rounding to the nearest is not"


def test_stochastic_rounding_depends_on_seed_block_and_value() -> None:
    x = gaussian(512, seed=3)
    data = encode(x, 512, "int8", "stochastic", 5, 9)
    assert same_bits(data, encode(x, 512, "int8", "stochastic", 5, 9))
    assert not same_bits(data, encode(x, 512, "int8", "stochastic", 6, 9))
    assert not same_bits(data, encode(x, 512, "int8", "stochastic", 5, 10))
    x = np.linspace(0.4, 0.6, 1000, dtype=np.float32)  # with one seed at one place, as a mean has it in every round
    up = [decode(encode(np.array([127, v], np.float32), 512, "int8", "stochastic"), 2)[1] for v in x]
    assert np.mean(up) == pytest.approx(0.5, abs=0.05)


# Tensors


@pytest.mark.parametrize("codec", NAMES)
def test_inputs_stay_as_they_are(codec: str) -> None:
    x = gaussian(600, seed=3)
    kept = x.copy()
    data = encode(x, codec=codec)
    assert same_bits(x, kept)
    kept_data = data.copy()
    decode(data, 600, codec=codec)[:] = 0
    data_again = encode(x, codec=codec)
    data[:] = 0
    assert same_bits(x, kept), "the encoded bytes are a copy"
    assert same_bits(data_again, kept_data)


@pytest.mark.parametrize("offset", [1, 2, 3, 4])
@pytest.mark.parametrize("codec", NAMES)
def test_decodes_from_any_place_in_a_message(codec: str, offset: int) -> None:
    """Bytes that do not begin at a multiple of four."""
    x = gaussian(1024, seed=4)
    data = encode(x, codec=codec)
    message = np.concatenate([np.zeros(offset, np.uint8), data])
    expected = decode(data, 1024, codec=codec)
    assert same_bits(decode(message[offset:], 1024, codec=codec), expected)
    view = torch.from_numpy(message)[offset:]  # which knows that it begins elsewhere
    assert same_bits(build_codec(CodecConfig(codec)).decode(view, 1024, 512).numpy(), expected)


@pytest.mark.parametrize("codec", NAMES)
@given(n=few, seed=seeds, weight=st.floats(2.0**-10, 1e9))
def test_accumulating_rounds_the_product_and_then_the_sum(codec: str, n: int, seed: int, weight: float) -> None:
    total, built = gaussian(n, seed + 1), build_codec(CodecConfig(codec))
    data = encode(gaussian(n, seed), codec=codec)
    got = torch.from_numpy(total.copy())
    built.accumulate(got, torch.from_numpy(data), weight, 512)
    assert same_bits(got.numpy(), total + reference.decode(codec, data, n, 512) * np.float32(weight))
