"""Workers without a model, for `Engine(make_workers=...)`: they draw what the masks allow, and like what ends an output.

A masked plan waits for its masks as a rank does, and what comes out of order is an error.
"""

import random
from array import array
from collections import deque

import trio

from dashinfer.errors import WorkerError
from dashinfer.text.tokenizer import Tokenizer
from dashinfer.types import FromParent, Masks, OutOfMemory, Ready, Reset, StepPlan, StepResult, TokenLogprobs

CLOSERS = ['"', "}", "]", ",", ":", "0"]


def ready(vocab_size: int, num_blocks: int) -> Ready:
    return Ready(
        architecture="Random",
        mode="llm",
        device="cpu",
        data_type="float32",
        vocab_size=vocab_size,
        max_length=1024,
        max_step_tokens=256,
        block_size=16,
        num_blocks=num_blocks,
        weight_bytes=0,
        kv_cache_bytes=0,
    )


def bits(mask: bytes, vocab_size: int) -> list[int]:
    return [token for token in range(vocab_size) if mask[token >> 3] >> (token & 7) & 1]


class RandomWorkers:
    """Implements `dashinfer.engine.api.Workers`.

    Args:
        exhausted: a step in which memory runs out.
        dies: a step in which the workers die.

    Attributes:
        masked: rows that took a mask.
        jumps: chunks that brought tokens.
        said: what each slot's sequence was, prompt and output, whenever a token was drawn for it.
    """

    def __init__(
        self, tokenizer: Tokenizer, seed: int = 0, exhausted: int | None = None, dies: int | None = None, num_blocks: int = 4096
    ) -> None:
        self.masked = self.jumps = 0
        self.said: set[tuple[int, ...]] = set()
        self._slots: dict[int, dict[int, int]] = {}  # tokens by slot and position
        self._ready = ready(tokenizer.vocab_size, num_blocks)
        self._random = random.Random(seed)
        self._closers = {tokenizer.encode(text)[-1] for text in CLOSERS} | set(tokenizer.eos_token_ids)
        self._plans: deque[StepPlan | Reset] = deque()
        self._masks: deque[Masks] = deque()
        self._arrived = trio.Event()
        self._exhausted = exhausted
        self._dies = dies

    async def send(self, message: FromParent) -> None:
        match message:
            case StepPlan() | Reset():
                self._plans.append(message)
            case Masks():
                self._masks.append(message)
            case _:
                raise AssertionError(message)
        self._arrived.set()

    async def run(self, *, on_progress, on_result, on_encoded, on_memory, task_status) -> None:
        task_status.started(self._ready)
        dropping = False
        while True:
            match await self._next(self._plans):
                case Reset():
                    dropping = False
                case StepPlan() as plan if not dropping:
                    if plan.step == self._exhausted:
                        dropping = True
                        on_memory(OutOfMemory(plan.step))
                    elif plan.step == self._dies:
                        raise WorkerError("a test")
                    else:
                        on_result(await self._step(plan))
                        await trio.lowlevel.checkpoint()

    async def _step(self, plan: StepPlan) -> StepResult:
        for enter in plan.enter:
            self._slots[enter.slot] = dict(enumerate(array("i", enter.tokens)))
        for chunk in plan.chunks:
            end, tokens = chunk.start + chunk.length, array("i", chunk.tokens)
            assert len(tokens) <= chunk.length
            self._slots[chunk.slot] |= zip(range(end - len(tokens), end), tokens, strict=True)
            self.jumps += bool(tokens)
        samplers = [chunk for chunk in plan.chunks if chunk.sample]
        masks: dict[int, bytes] = {}
        if plan.masked:
            message = await self._next(self._masks)
            while message.step < plan.step:  # of a plan that was dropped
                message = await self._next(self._masks)
            assert message.step == plan.step
            length = -(-self._ready.vocab_size // 32) * 4
            assert len(message.words) == len(message.rows) * length
            masks = {row: message.words[i * length : (i + 1) * length] for i, row in enumerate(message.rows)}
            assert all(row < len(samplers) for row in masks)
        self.masked += len(masks)
        tokens = [self._draw(masks.get(row)) for row in range(len(samplers))]
        for chunk, token in zip(samplers, tokens, strict=True):
            end = chunk.start + chunk.length
            known = self._slots[chunk.slot]
            known[end] = token
            self.said.add(tuple(known[position] for position in range(end + 1)))
        return StepResult(plan.step, tokens, {row: TokenLogprobs(-1.0, (), ()) for row in range(len(samplers))})

    def _draw(self, mask: bytes | None) -> int:
        if mask is None:
            return self._random.randrange(self._ready.vocab_size)
        allowed = bits(mask, self._ready.vocab_size)
        assert allowed, "a mask that allows nothing"
        closers = [token for token in allowed if token in self._closers]
        return self._random.choice(closers if closers and self._random.random() < 0.4 else allowed)

    async def _next(self, queue):
        while not queue:
            self._arrived = trio.Event()
            await self._arrived.wait()
        return queue.popleft()
