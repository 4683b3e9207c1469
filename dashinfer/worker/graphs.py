"""Decoding steps as CUDA graphs: one recording for each of a few batch sizes, replayed without Python.

Knows static inputs, static outputs and sizes; what is recorded is the caller's function.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dashinfer.worker.staging import Staging

# From inputs, int32 [width, size], to logits, [size, vocabulary], or None on a rank that does not sample. Reads and writes
# nothing that moves, and waits for nothing; what it tells other ranks is recorded, too.
Record = Callable[[Tensor], Tensor | None]


def bucket_sizes(max_batch: int) -> list[int]:
    """Batch sizes to record, ascending, up to `max_batch`: steps of 8 from 8 on, and of an eighth of the size from 128 on."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < max_batch:
        sizes.append(sizes[-1] + max(8, 1 << (sizes[-1].bit_length() - 4)))
    return sorted({min(size, max_batch) for size in sizes})


@dataclass
class _Recording:
    graph: "torch.cuda.CUDAGraph"
    inputs: Tensor
    logits: Tensor | None


class DecodeGraphs:
    """Graphs of `record` for up to `max_batch` rows, recorded here and now, the largest first, whose memory all share.

    Args:
        padding: the inputs of a row without a sequence, int32 [width].
        report: called with the number of graphs recorded and of all.
    """

    def __init__(
        self,
        record: Record,
        *,
        max_batch: int,
        padding: np.ndarray,
        device: torch.device,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._padding = padding[:, None]
        self._sizes = bucket_sizes(max_batch)
        self._recordings: dict[int, _Recording] = {}
        pool = torch.cuda.graph_pool_handle()
        # one stream for all: libraries keep a workspace for each that they have seen
        aside = torch.cuda.Stream()
        for size in reversed(self._sizes):
            report(len(self._recordings), len(self._sizes))
            inputs = torch.from_numpy(np.repeat(self._padding, size, 1)).to(device)
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # compiles kernels, connects ranks, and lets libraries take their workspaces
                for _ in range(2):
                    record(inputs)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # what other threads do meanwhile, such as NCCL's watch over its own, is no part of it
            with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                logits = record(inputs)
            self._recordings[size] = _Recording(graph, inputs, logits)
        report(len(self._sizes), len(self._sizes))

    def __call__(self, columns: np.ndarray, staging: Staging) -> tuple[Tensor | None, Tensor]:
        """Run a step.

        Args:
            columns: [width, rows] int32.

        Returns:
            Logits [rows, vocabulary] or None, and the columns on the device; both are overwritten by the next call.
        """
        rows = columns.shape[1]
        size = self._sizes[bisect_left(self._sizes, rows)]
        padded = np.repeat(self._padding, size, 1)
        padded[:, :rows] = columns
        recording = self._recordings[size]
        staging.upload_into(recording.inputs, padded)
        recording.graph.replay()
        return None if recording.logits is None else recording.logits[:rows], recording.inputs[:, :rows]
