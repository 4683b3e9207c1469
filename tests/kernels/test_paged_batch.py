import numpy as np
import pytest
import torch

from dashinfer_kernels import PagedBatch

STARTS, LENGTHS, TABLES = [5, 16, 0, 30], [1, 1, 3, 5], [[7], [2, 9], [4], [1, 3, 8]]


def test_lays_out_positions_and_slots() -> None:
    batch = PagedBatch.build(STARTS, LENGTHS, TABLES, block_size=16, device="cpu")

    assert batch.positions.tolist() == [5, 16, 0, 1, 2, 30, 31, 32, 33, 34]
    assert batch.slot_mapping.tolist() == [117, 144, 64, 65, 66, 62, 63, 128, 129, 130]
    assert batch.query_starts.tolist() == [0, 1, 2, 5, 10]
    assert batch.context_lengths.tolist() == [6, 17, 3, 35]
    assert batch.num_decodes == 2
    assert (batch.num_tokens, batch.num_sequences) == (10, 4)
    dtypes = [tensor.dtype for tensor in (batch.positions, batch.slot_mapping, batch.query_starts, batch.block_tables)]
    assert dtypes == [torch.int64, torch.int64, torch.int32, torch.int32]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_an_array_is_cut_and_copied(as_tensor: bool) -> None:
    array = np.full((4, 100), -1, dtype=np.int32)
    for row, table in zip(array, TABLES, strict=True):
        row[: len(table)] = table
    batch = PagedBatch.build(STARTS, LENGTHS, torch.from_numpy(array) if as_tensor else array, block_size=16, device="cpu")
    array[:] = 99

    expected = PagedBatch.build(STARTS, LENGTHS, TABLES, block_size=16, device="cpu")
    assert torch.equal(batch.slot_mapping, expected.slot_mapping)
    assert batch.block_tables.shape == (4, 3)
    assert batch.block_tables[3].tolist() == [1, 3, 8]


def test_one_token_after_a_longer_chunk_is_no_decode() -> None:
    batch = PagedBatch.build([0, 0, 0], [1, 4, 1], [[0], [1], [2]], block_size=16, device="cpu")

    assert batch.num_decodes == 1


def test_all_decode_and_empty() -> None:
    assert PagedBatch.build([3, 4], [1, 1], [[0], [1]], block_size=16, device="cpu").num_decodes == 2
    empty = PagedBatch.build([], [], [], block_size=16, device="cpu")
    assert (empty.num_tokens, empty.num_sequences, empty.num_decodes) == (0, 0, 0)
    assert empty.query_starts.tolist() == [0]
