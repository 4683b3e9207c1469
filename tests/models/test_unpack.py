"""Unpacking against what numpy packs bit by bit."""

import numpy as np
import pytest
import torch

from dashinfer.models.unpack import unpack, unpack_awq, unpack_zeros


def packed(values: np.ndarray, bits: int) -> torch.Tensor:
    """[rows, count] -> [rows, words] int32, lowest bits first."""
    stream = ((values[:, :, None] >> np.arange(bits)) & 1).reshape(len(values), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32))).reshape(len(values), -1, 32)
    words = (stream.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return torch.from_numpy(words.view(np.int32))


def drawn(bits: int, count: int) -> np.ndarray:
    return np.random.default_rng(bits).integers(0, 2**bits, (5, count))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [32, 96, 7])
def test_integers_of_a_few_bits(bits, count):
    values = drawn(bits, count)

    assert np.array_equal(unpack(packed(values, bits), bits, count).numpy(), values)
    assert np.array_equal(unpack(packed(values, bits).T.contiguous().T, bits, count).numpy(), values)


def test_the_order_of_awq():
    values = drawn(4, 64)
    stored = values.reshape(5, 8, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(5, 64)

    assert np.array_equal(unpack_awq(packed(stored, 4)).numpy(), values.T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_less_one(bits):
    values = drawn(bits, 64).clip(1)

    found = unpack_zeros(packed(values - 1, bits), bits, 64, ones=bits)

    assert np.array_equal(found.numpy(), values)
    assert np.array_equal(unpack_zeros(packed(values, bits), bits, 64, ones=None).numpy(), values)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_a_zero_point_of_zero_borrowed_is_given_back(bits):
    values = drawn(bits, 64)
    values[:, ::5] = 0
    ones = sum(1 << place for place in range(0, 32, bits))
    words = (packed(values, bits).long() - ones) % 2**32
    stored = torch.from_numpy(words.numpy().astype(np.uint32).view(np.int32))

    assert np.array_equal(unpack_zeros(stored, bits, 64, ones=bits).numpy(), values)


def test_ones_were_taken_from_integers_of_other_bits():
    values = drawn(8, 64)
    stored = packed(values, 8) - 0x11111111

    assert np.array_equal(unpack_zeros(stored, 8, 64, ones=4).numpy(), values)


def test_three_bits_of_zero_less_one_wrap():
    values = drawn(3, 64)

    assert np.array_equal(unpack_zeros(packed((values - 1) % 8, 3), 3, 64, ones=3).numpy(), values)
