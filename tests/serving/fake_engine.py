"""An engine and a backend without a model: what they answer is written in the prompt, and what happens to them is recorded.

The last line of a prompt is a command, and the tokens are bytes, but for markers that a tokenizer has:
    say TEXT      answers TEXT and ends the turn
    forever       answers "x" without end
    wait TEXT     answers the first byte of TEXT, and the rest once `release` is set
    crash         answers "x", then the engine fails
"""

import math
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
import trio
import trio.testing
from tokenizers import decoders, models, pre_tokenizers

from dashinfer.config import ServerConfig
from dashinfer.engine.api import EngineState, EngineStats, PromptMedia, TokenOutput
from dashinfer.errors import (
    ContextLengthExceeded,
    EngineUnavailable,
    InsufficientMemory,
    InternalError,
    QueueFull,
    WorkerError,
)
from dashinfer.guidance.guide import Grammar
from dashinfer.serving.service import TextModel
from dashinfer.sources import ModelSource, ReportProgress, TokenizerFiles
from dashinfer.text.chat_template import ChatTemplate
from dashinfer.text.tokenizer import Tokenizer, byte_alphabet
from dashinfer.types import ModelFiles, Progress, Ready, SamplingParams, TokenLogprobs

END = 256  # the token that ends a turn
_MARKERS = 0xF0000  # a private character for each token that is no byte
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|end|>{% endif %}"
)
INFO = Ready(
    architecture="FakeForCausalLM",
    mode="llm",
    device="cpu",
    data_type="bfloat16",
    vocab_size=257,
    max_length=4096,
    max_step_tokens=512,
    block_size=16,
    num_blocks=1000,
    weight_bytes=2**20,
    kv_cache_bytes=2**20,
)


def write_tokenizer(
    folder: Path, template: str = TEMPLATE, markers: Sequence[str] = (), special: Sequence[str] = ()
) -> TokenizerFiles:
    """A byte-level tokenizer whose token ids are the bytes. `markers` become tokens too, and `special` ones that are hidden."""
    vocabulary = {character: byte for byte, character in byte_alphabet().items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(list(markers))
    tokenizer.add_special_tokens(list(special))
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return TokenizerFiles(path, {"eos_token": "<|end|>"}, template)


@cache
def _spell(token: int) -> bytes:
    return bytes([token]) if token < END else chr(_MARKERS + token).encode()


def make_text(folder: Path) -> TextModel:
    source = ModelSource(ModelFiles("fake", "safetensors", (), {}), write_tokenizer(folder))
    tokenizer = Tokenizer.from_source(source)
    return TextModel(tokenizer, ChatTemplate.from_files(source.tokenizer, tokenizer.special_tokens), {})


class FakeGeneration:
    def __init__(self, engine: "FakeEngine", prompt: list[int], params: list[SamplingParams]) -> None:
        self.cached_tokens = len(prompt) // 16 * 16
        self.embedding = None if params[0].pooling is None else array("f", [3.0, 4.0, float(len(prompt))]).tobytes()
        asked = params[0].prompt_logprobs
        self.prompt_logprobs: list[TokenLogprobs] = []
        if asked is not None:
            self.prompt_logprobs = [
                TokenLogprobs(-float(place), tuple(range(65, 65 + asked)), (-0.25,) * asked) for place in range(1, len(prompt))
            ]
        self._engine = engine
        self._params = params
        end = len(prompt) - prompt[::-1].index(END) - 1 if END in prompt else len(prompt)
        spelled = b"".join(map(_spell, prompt[:end])).decode()
        command = re.sub(f"^[{chr(_MARKERS)}-{chr(sys.maxunicode)}]+", "", spelled.rsplit(": ", 1)[-1])  # without its images
        self._verb, _, rest = command.partition(" ")
        self._waits_after = 1 if self._verb in ("wait", "crash") else math.inf
        said = [[ord(c) - _MARKERS] if ord(c) > _MARKERS else list(c.encode()) for c in rest]
        answer: Iterator[int] = iter([*(token for tokens in said for token in tokens), END])
        if self._verb in ("forever", "crash"):
            answer = iter(lambda: ord("x"), None)
        self._answers = {index: list(islice(answer, 10**6)) if index == 0 else [] for index in range(len(params))}
        for index in self._answers:
            self._answers[index] = self._answers[0]
        self._sent = dict.fromkeys(self._answers, 0)

    @property
    def queue_time(self) -> float | None:
        return self._engine.queue_time

    async def receive(self) -> list[TokenOutput]:
        await self._engine.gate.wait()
        if not self._sent:
            return []
        if min(self._sent.values()) >= self._waits_after:
            self._waits_after = math.inf
            if self._verb == "crash":
                self._engine.crash.set()
            with self._engine.waiting():
                await self._engine.release.wait()
        if self._engine.lost is not None:
            raise self._engine.lost
        outputs = []
        for index in list(self._sent):
            for _ in range(self._engine.at_once):
                if self._sent.get(index, math.inf) >= self._waits_after or index not in self._sent:
                    break
                outputs.append(self._next(index))
        return outputs

    def _next(self, index: int) -> TokenOutput:
        params = self._params[index]
        token = self._answers[index][self._sent[index]]
        self._sent[index] += 1
        finish = "stop" if token in params.stop_token_ids else "length" if self._sent[index] >= params.max_tokens else None
        if finish:
            del self._sent[index]
        logprobs = None
        if params.logprobs is not None:
            logprobs = TokenLogprobs(-0.5, tuple(range(65, 65 + params.logprobs)), (-0.5,) * params.logprobs)
        return TokenOutput(index, token, logprobs, finish)

    def stop(self, index: int) -> None:
        self._engine.record.append(f"stop {index}")
        self._sent.pop(index, None)


class FakeEngine:
    """Attributes:
    model: what it says that it serves.
    record: what happened, in order.
    submitted: what `submit` was given, in order.
    running: generations whose block has not been left.
    at_once: tokens a choice gets with each receive.
    gate: what generations wait for before anything is received; open.
    refusal: raised by submit, if set.
    queue_time: of all generations.
    """

    def __init__(self, *, load: bool = True) -> None:
        self.state: EngineState = "loading"
        self.info: Ready | None = None
        self.model = INFO
        self.record: list[str] = []
        self.submitted: list[tuple[list[int], list[SamplingParams], PromptMedia | None]] = []
        self.grammars: list[Grammar | None] = []
        self.running = 0
        self.at_once = 1
        self.gate = trio.Event()
        self.gate.set()
        self.refusal: Exception | None = None
        self.queue_time: float | None = 0.25
        self.lost: Exception | None = None
        self.release, self.crash, self.loaded = trio.Event(), trio.Event(), trio.Event()
        self._changed = trio.Event()
        self._waiting = 0
        if load:
            self.loaded.set()

    async def run(self, *, task_status: trio.TaskStatus[Ready] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            await self.loaded.wait()
            self.state, self.info = "ready", self.model
            task_status.started(self.model)
            await self.crash.wait()
            self.lost = InternalError("the engine lost this request")
            self.state = "failed"
            self.release.set()
            with trio.move_on_after(2):  # as the real one: those it has are told
                await self.drained()
            raise WorkerError("rank 0 died with signal 9")
        except trio.Cancelled:
            self.lost = EngineUnavailable("the server shut down before the request was done")
            raise
        finally:
            self.release.set()
            self.record.append("run ended")

    def begin_drain(self) -> None:
        self.state = "draining"
        self.record.append("drain")

    async def drained(self) -> None:
        await self.until(lambda: self.running == 0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._waiting += 1
        self._notify()
        try:
            yield
        finally:
            self._waiting -= 1

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns once `condition` holds; it is looked at whenever a request begins, waits or ends."""
        with trio.fail_after(10):
            while not condition():
                await self._changed.wait()

    async def until_waiting(self, count: int = 1) -> None:
        """Returns once `count` generations wait for `release`."""
        await self.until(lambda: self._waiting >= count)

    async def submitted_by_then(self, running: int) -> int:
        """How many requests there were once so many run, and as many more as come by themselves."""
        await self.until(lambda: self.running == running)
        await trio.testing.wait_all_tasks_blocked(0.05)
        return len(self.submitted)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def submit(
        self, prompt: list[int], params: list[SamplingParams], media: PromptMedia | None = None, grammar: Grammar | None = None
    ) -> Any:
        if self.refusal is not None:
            raise self.refusal
        if self.state not in ("ready", "recovering"):
            raise EngineUnavailable(f"the engine is {self.state}")
        if len(prompt) >= self.model.max_length:
            raise ContextLengthExceeded("the prompt leaves no room")
        self.submitted.append((prompt, params, media))
        self.grammars.append(grammar)
        return self._life(FakeGeneration(self, prompt, params))

    @contextmanager
    def _life(self, generation: FakeGeneration) -> Iterator[FakeGeneration]:
        self.running += 1
        self.record.append("begin")
        self._notify()
        try:
            yield generation
        finally:
            self.running -= 1
            self.record.append("end")
            self._notify()

    def stats(self) -> EngineStats:
        return EngineStats(self.running, 0, INFO.num_blocks, 0, 0, 0, 0, 0)


class SeeingEngine(FakeEngine):
    """Serves a model that sees."""

    def __init__(self) -> None:
        super().__init__()
        self.model = msgspec.structs.replace(INFO, mode="vlm", vocab_size=261, max_length=8192, vision_engine="native")

    def resize(self, max_length: int) -> None:
        """Another length of context, once it is loaded."""
        self.info = self.model = msgspec.structs.replace(self.model, max_length=max_length)


class FullEngine(FakeEngine):
    """Has no place in its queue."""

    def __init__(self) -> None:
        super().__init__()
        self.refusal = QueueFull("256 requests wait already; try again later")


class FakeBackend:
    """The model's name says what happens: `never-loads`, `no-memory`, `never-ends`, or anything else, which works."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def resolve(self, config: ServerConfig, report: ReportProgress) -> ModelSource:
        report("download", 0, 1000, "B")
        report("download", 1000, 1000, "B")
        return ModelSource(ModelFiles(config.model, "safetensors", (), {}), write_tokenizer(self._folder))

    def engine(self, config: ServerConfig, source: ModelSource, on_progress: Callable[[Progress], None]) -> FakeEngine:
        on_progress(Progress("weights", 10, 100, "B"))
        on_progress(Progress("weights", 100, 100, "B"))
        name = source.files.name
        if name == "no-memory":
            return _NoMemory()
        if name == "never-ends":
            return _NeverEnds()
        return FakeEngine(load=name != "never-loads")

    def text(self, config: ServerConfig, source: ModelSource) -> TextModel:
        return make_text(self._folder)


class _NoMemory(FakeEngine):
    async def run(self, *, task_status: trio.TaskStatus[Ready] = trio.TASK_STATUS_IGNORED) -> None:
        await trio.lowlevel.checkpoint()
        raise InsufficientMemory("the weights need 15.2 GiB and 4.0 GiB are free; take a smaller model")


class _NeverEnds(FakeEngine):
    """Cannot be cancelled, as an engine must not be."""

    async def run(self, *, task_status: trio.TaskStatus[Ready] = trio.TASK_STATUS_IGNORED) -> None:
        self.state, self.info = "ready", INFO
        task_status.started(INFO)
        with trio.CancelScope(shield=True):
            await trio.sleep_forever()
