"""Between the stages of a pipeline: the residual stream goes on to the next stage, sampled tokens go back to the first.

Ranks with the same place in their stages speak to each other, each pair in a group of torch.distributed's of its own, so that
what goes one way does not wait for what goes the other. Everything arrives in the order of the plans.

Nothing waits in a circle: a stage waits for the one before it and, once it is two steps ahead, for the one after it; the last
waits for nobody, since the first has asked for a step's tokens before it does anything else. On a GPU it is the stream that
waits, and nothing is under way there when all plans have been computed.
"""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from dashinfer.models.stage import Stage

STEPS_UNDER_WAY = 2  # tensors that are sent and may not have been taken, each way


class Arriving:
    """A tensor that another rank sends."""

    def __init__(self, x: Tensor, work: dist.Work | None) -> None:
        assert work is not None
        self._x, self._work = x, work

    def wait(self) -> Tensor:
        """The tensor, once it is there."""
        self._work.wait()
        return self._x


class Outbox:
    """What is sent to the other rank of a pair; it is kept until that has taken it."""

    def __init__(self, pair: dist.ProcessGroup, to: int) -> None:
        """`to`: the other's rank in the pair."""
        self._pair, self._to = pair, to
        self._sent: deque[Arriving] = deque()

    def send(self, x: Tensor) -> None:
        """`x` must not change afterwards."""
        while len(self._sent) >= STEPS_UNDER_WAY:
            self._sent.popleft().wait()
        x = x.contiguous()
        self._sent.append(Arriving(x, dist.isend(x, group=self._pair, group_dst=self._to)))


class Pipeline:
    """A rank's connections to the ranks of other stages that have its place.

    Args:
        stage: of this rank; there are several.
        before, after: its pair with the neighbouring stages, in the order of the stages; None where there is none.
        ends: of the first and the last stage, their pair for tokens, in that order; None on others.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        before: dist.ProcessGroup | None,
        after: dist.ProcessGroup | None,
        ends: dist.ProcessGroup | None,
    ) -> None:
        self.stage = stage
        self._before, self._ends = before, ends
        self._onward = None if after is None else Outbox(after, 1)
        self._back = Outbox(ends, 0) if stage.last and ends is not None else None

    def receive(self, tokens: int, hidden: int, device: torch.device) -> Tensor:
        """What the stage before sent next: [tokens, hidden] float32."""
        x = torch.empty(tokens, hidden, dtype=torch.float32, device=device)
        return Arriving(x, dist.irecv(x, group=self._before, group_src=0)).wait()

    def send(self, residual: Tensor) -> None:
        """To the stage after: [tokens, hidden] float32."""
        assert self._onward is not None
        self._onward.send(residual)

    def send_tokens(self, tokens: Tensor) -> None:
        """From the last stage to the first: [rows] int64."""
        assert self._back is not None
        self._back.send(tokens)

    def expect_tokens(self, rows: int, device: torch.device) -> Arriving:
        """On the first stage: what the last one will send next, [rows] int64."""
        x = torch.empty(rows, dtype=torch.int64, device=device)
        return Arriving(x, dist.irecv(x, group=self._ends, group_src=1))
