"""The pages of the KV cache: who holds which, and which hold a prefix that may be used again.

Owns the numbers of the blocks and nothing else: no tensors, no sequences, no clock. A block is in exactly one of three states:

- *free*: its content means nothing;
- *used*: held by one or more sequences (a shared prefix has several holders);
- *cached*: held by nobody, but its content is known by a hash, so that a later prompt with the same beginning can take it. The
  least recently released cached block is given up first when free ones run out.

Free blocks are handed out lowest number first, which keeps what is in use together at the low end of the pool.
"""

import hashlib
import heapq
import struct
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from dashinfer.engine.api import PromptMedia


def extend_hashes(hashes: list[bytes], tokens: Sequence[int], block_size: int, media: PromptMedia | None = None) -> None:
    """Append the hashes of the full blocks of `tokens` that `hashes` lacks.

    A block's hash is the SHA-256 of its predecessor's hash and its own token ids, so it stands for the whole prefix and two
    prefixes never share one by accident. With `media` it is also of what is shown in the block, by the keys of its content, and
    of the positions that its tokens are rotated by.
    """
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        parent = hashes[-1] if hashes else b""
        end = start + block_size
        content = array("i", tokens[start:end]).tobytes()
        if media is not None:
            content += _shown(media, start, end)
        hashes.append(hashlib.sha256(parent + content).digest())


def _shown(media: PromptMedia, start: int, end: int) -> bytes:
    prompt = len(media.positions) // 12
    parts = [media.positions[4 * (axis * prompt + start) : 4 * (axis * prompt + min(end, prompt))] for axis in range(3)]
    if end > prompt:
        parts.append(struct.pack("<i", media.delta))
    for span in media.spans:
        if span.start < end and span.end > start:
            parts.append(struct.pack("<iii", span.start - start, span.offset, span.length) + span.key)
    return b"".join(parts)


class BlockPool:
    """`num_blocks` blocks, numbered from 0."""

    def __init__(self, num_blocks: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self._prefix_cache = prefix_cache
        self._free = list(range(num_blocks))  # a heap
        self._holders = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest release first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix. Nothing is taken: `share` does that."""
        found = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of `blocks`, used or cached."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._cached[block]
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks of meaningless content for one holder. The caller has looked at `num_available`."""
        assert count <= self.num_available
        taken = []
        for _ in range(count):
            if self._free:
                block = heapq.heappop(self._free)
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def register(self, block: int, digest: bytes) -> None:
        """Say that a used block holds (or will hold, before any later plan runs) the prefix of `digest`."""
        assert self._holders[block] > 0
        if self._prefix_cache and digest not in self._block_of and self._hash_of[block] is None:
            self._hash_of[block] = digest
            self._block_of[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one holder's blocks, in the order of its block table. The tail of a prefix is the first to be evicted."""
        for block in reversed(blocks):
            assert self._holders[block] > 0
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._hash_of[block] is None:
                    heapq.heappush(self._free, block)
                else:
                    self._cached[block] = None

    def reset(self) -> None:
        """Every content is lost. No block is used."""
        assert self.num_used == 0
        for block in self._cached:
            self._forget(block)
            heapq.heappush(self._free, block)
        self._cached.clear()

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        assert digest is not None
        self._hash_of[block] = None
        del self._block_of[digest]
