"""Compression: exact against the numpy quantizer, exact in size, local in its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diloco.codec import CODECS, GROUP
from tests import reference

int8 = CODECS["int8"]
FLOATS = st.floats(-(2.0**126), 2.0**126, width=32)
SIZES = [1, 2, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1800, 4096]
"""Around groups and blocks of 512, and not multiples of any vector width."""
few = st.integers(1, 1500)
seeds = st.integers(0, 2**32 - 1)


def gaussian(n: int, seed: int, wild: bool = False) -> np.ndarray:
    """Pseudo-gradient-like; wild: over sixty orders of magnitude, with zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    if wild:
        x *= 10.0 ** rng.integers(-30, 30, size=n) * rng.integers(0, 2, size=n)
    return x.astype(np.float32)


def encode(x: np.ndarray, block: int = 512, codec: str = "int8") -> np.ndarray:
    return CODECS[codec].encode(torch.from_numpy(x), block).numpy()


def decode(data: np.ndarray, n: int, block: int = 512, codec: str = "int8") -> np.ndarray:
    return CODECS[codec].decode(torch.from_numpy(data), n, block).numpy()


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


# Against the reference


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("wild", [False, True])
def test_equals_the_reference(codec: str, n: int, wild: bool) -> None:
    x = gaussian(n, seed=n, wild=wild)
    data = encode(x, codec=codec)
    assert same_bits(data, reference.encode(codec, x, 512))
    assert same_bits(decode(data, n, codec=codec), reference.decode(codec, data, n, 512))


@given(hnp.arrays(np.float32, st.integers(1, 40), elements=FLOATS), st.sampled_from([256, 512, 768]), few)
def test_equals_the_reference_on_any_floats(head: np.ndarray, block: int, length: int) -> None:
    """Arbitrary values (subnormal ones too), repeated so that they meet groups and blocks everywhere."""
    x = np.resize(head, length)
    data = encode(x, block)
    assert same_bits(data, reference.encode("int8", x, block))
    assert same_bits(decode(data, length, block), reference.decode("int8", data, length, block))


@given(st.binary(min_size=1, max_size=64), few, seeds)
def test_decode_equals_the_reference_on_any_bytes(values: bytes, n: int, seed: int) -> None:
    """What arrives from elsewhere decodes alike too, -128 included."""
    data = np.resize(np.frombuffer(values, np.uint8), int8.size(n, 512)).copy()
    scales = np.abs(gaussian(n, seed)).view(np.uint8)
    for start in range(0, n, 512):
        at, groups = int8.size(start, 512), reference.groups(min(512, n - start))
        data[at : at + 4 * groups] = scales[: 4 * groups]
    assert same_bits(decode(data, n), reference.decode("int8", data, n, 512))


def test_golden_bytes() -> None:
    """Scale 1 (absmax 127), half to even, little endian, scales before values."""
    x = np.array([127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.49, 126.6, 0.0], np.float32)
    values = np.array([127, -127, 0, 2, 2, 0, -2, 0, 127, 0], np.int8)
    data = encode(x)
    assert data.tobytes() == bytes.fromhex("0000803f") + values.tobytes()
    assert decode(data, len(x)).tolist() == [127.0, -127.0, 0.0, 2.0, 2.0, 0.0, -2.0, 0.0, 127.0, 0.0]


def test_golden_decode_rounds_once() -> None:
    """3 * fl(0.1) in fp32 is one rounding of the product: 0x3e99999a."""
    data = np.frombuffer(np.float32(0.1).tobytes() + bytes([3, 253, 0]), np.uint8).copy()
    got = decode(data, 3)
    assert got.view(np.uint32).tolist() == [0x3E99999A, 0xBE99999A, 0]


# Size and layout


@given(st.integers(0, 5000), st.sampled_from([256, 512, 1024, 65536]))
def test_exact_size(n: int, block: int) -> None:
    """1 byte an element and 4 a group; `none` is 4 an element."""
    expected = 0
    for start in range(0, n, block):
        length = min(block, n - start)
        expected += length + 4 * -(-length // GROUP)
    for name, size in (("int8", expected), ("none", 4 * n)):
        codec = CODECS[name]
        data = codec.encode(torch.zeros(n), block)
        assert codec.size(n, block) == size == data.numel()
        assert data.dtype == torch.uint8
        back = codec.decode(data, n, block)
        assert back.numel() == n and back.dtype == torch.float32


@pytest.mark.parametrize("codec", CODECS)
@given(n=few, seed=seeds)
def test_a_block_does_not_depend_on_its_neighbours(codec: str, n: int, seed: int) -> None:
    x, block = gaussian(n, seed, wild=True), 256
    parts = [encode(x[i : i + block], block, codec) for i in range(0, n, block)]
    assert same_bits(encode(x, block, codec), np.concatenate(parts))
    lengths = [min(block, n - i) for i in range(0, n, block)]
    back = [decode(p, m, block, codec) for p, m in zip(parts, lengths, strict=True)]
    assert same_bits(decode(encode(x, block, codec), n, block, codec), np.concatenate(back))


# Errors


@given(few, seeds, st.booleans())
@example(257, 1, True)
def test_error_is_at_most_half_a_scale(n: int, seed: int, wild: bool) -> None:
    """Of the element's own group; the two fp32 roundings (quotient, product) add at most 127 ulp of the scale."""
    x = gaussian(n, seed, wild)
    back = decode(encode(x), n)
    for start in range(0, n, GROUP):
        group = slice(start, start + GROUP)
        scale = np.abs(x[group]).max().astype(np.float64) / 127
        error = np.abs(x[group].astype(np.float64) - back[group])
        assert error.max() <= scale * (0.5 + 127 * 2.0**-22)


def test_zero_stays_zero() -> None:
    x = np.zeros(700, np.float32)
    assert not encode(x).any()
    assert not decode(encode(x), 700).any()
    x[300] = -1.0  # a zero group beside one that is not
    back = decode(encode(x), 700)
    assert back[300] == -1.0 and np.count_nonzero(back) == 1


def test_a_group_too_small_for_a_scale_is_zero() -> None:
    """absmax / 127 underflows: values are zero, not what a division by zero would give."""
    x = np.full(256, 1e-44, np.float32)
    assert x.all() and not encode(x).any()


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


@pytest.mark.parametrize("codec", CODECS)
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


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("codec", CODECS)
def test_decodes_from_any_place_in_a_message(codec: str, offset: int) -> None:
    """Bytes that do not begin at a multiple of four."""
    x = gaussian(600, seed=4)
    data = encode(x, codec=codec)
    message = np.concatenate([np.zeros(offset, np.uint8), data])
    assert same_bits(decode(message[offset:], 600, codec=codec), decode(data, 600, codec=codec))
