import dataclasses
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dashinfer.engine.blocks import BlockPool, extend_hashes

from .fake_rank import PLACEHOLDER, show


def hashes_of(tokens: list[int], block_size: int = 2) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, block_size)
    return hashes


def test_a_hash_stands_for_the_whole_prefix():
    same_second_block = hashes_of([1, 2, 3, 4])[1], hashes_of([9, 2, 3, 4])[1]

    assert same_second_block[0] != same_second_block[1]
    assert hashes_of([1, 2, 3, 4, 5]) == hashes_of([1, 2, 3, 4])


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20), st.integers(1, 5))
def test_hashes_grow_as_they_would_at_once(tokens, block_size):
    grown: list[bytes] = []
    for end in range(len(tokens) + 1):
        extend_hashes(grown, tokens[:end], block_size)

    assert grown == hashes_of(tokens, block_size)
    assert len(grown) == len(tokens) // block_size


def test_lowest_blocks_first():
    pool = BlockPool(4)
    first = pool.allocate(3)
    pool.release(first[:2])

    assert pool.allocate(2) == [0, 1]


def test_a_released_prefix_is_found_again():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    hashes = hashes_of([1, 2, 3, 4])
    for block, digest in zip(blocks, hashes, strict=True):
        pool.register(block, digest)
    pool.release(blocks)

    assert pool.match(hashes) == blocks
    assert (pool.num_used, pool.num_cached, pool.num_available) == (0, 2, 4)


def test_the_tail_of_a_prefix_is_evicted_before_its_head():
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    hashes = hashes_of([1, 2, 3, 4])
    for block, digest in zip(blocks, hashes, strict=True):
        pool.register(block, digest)
    pool.release(blocks)

    assert pool.allocate(1) == [blocks[1]]
    assert pool.match(hashes) == [blocks[0]]


def test_the_least_recently_released_prefix_is_evicted_first():
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    old, new = hashes_of([1, 2]), hashes_of([3, 4])
    pool.register(blocks[0], old[0])
    pool.register(blocks[1], new[0])
    pool.release([blocks[0]])
    pool.release([blocks[1]])
    pool.share([blocks[0]])  # a hit makes it recent
    pool.release([blocks[0]])
    pool.allocate(1)

    assert pool.match(old) == [blocks[0]]
    assert pool.match(new) == []


def test_without_a_prefix_cache_nothing_is_kept():
    pool = BlockPool(2, prefix_cache=False)
    blocks = pool.allocate(1)
    pool.register(blocks[0], hashes_of([1, 2])[0])
    pool.release(blocks)

    assert pool.num_cached == 0


def test_more_blocks_than_there_are():
    with pytest.raises(AssertionError):
        BlockPool(2).allocate(3)


class PoolMachine(RuleBasedStateMachine):
    """Random holders against a model: a count of holders a block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.held: list[list[int]] = []
        self.content: dict[int, int] = {}  # block -> the prefix number registered for it

    @precondition(lambda self: self.pool.num_available)
    @rule(data=st.data())
    def allocate(self, data):
        blocks = self.pool.allocate(data.draw(st.integers(1, self.pool.num_available)))
        assert not {block for holder in self.held for block in holder} & set(blocks)
        for block in blocks:
            self.content.pop(block, None)
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), prefix=st.integers(0, 4))
    def register(self, data, prefix):
        block = data.draw(st.sampled_from(self.held[-1]))
        if block not in self.content and prefix not in self.content.values():
            self.content[block] = prefix
        self.pool.register(block, bytes([prefix]))

    @rule(prefix=st.integers(0, 4))
    def hit(self, prefix):
        found = self.pool.match([bytes([prefix])])
        assert found == [block for block, content in self.content.items() if content == prefix]
        if found:
            self.pool.share(found)
            self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_block_is_in_one_state(self):
        used = {block for holder in self.held for block in holder}
        assert self.pool.num_used == len(used)
        assert self.pool.num_used + self.pool.num_available == self.pool.num_blocks
        assert self.pool.num_cached == len(set(self.content) - used)


TestPool = PoolMachine.TestCase


def test_hashes_are_of_what_is_shown():
    def hashes(media: list[tuple[int, int]], positions: bytes | None = None) -> list[bytes]:
        tokens, shown = show(list(range(8)), media)
        if positions is not None:
            shown = dataclasses.replace(shown, positions=positions)
        found: list[bytes] = []
        extend_hashes(found, [*tokens, 1, 2, 3, 4], 4, shown)
        return found

    one, other = hashes([(4, 1), (6, 1)]), hashes([(4, 1), (6, 1)])
    assert one == other
    assert hashes([(4, 1), (4, 1)])[:1] == one[:1]  # the text before
    assert hashes([(0, 1)])[0] != hashes([(0, 2)])[0]
    text: list[bytes] = []
    extend_hashes(text, [PLACEHOLDER, PLACEHOLDER, *range(8)], 4)
    assert hashes([(0, 1)])[0] != text[0]
    moved = array("i", [each + 1 for each in range(12)] * 3).tobytes()
    assert hashes([(4, 1), (6, 1)], moved)[0] != one[0]
