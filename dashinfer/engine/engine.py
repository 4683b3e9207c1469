"""The engine: requests go in, tokens come out, and the workers never wait for Python.

Owns the worker group, the scheduler and the open requests, and the one loop that moves work between them. While there is work,
the workers have their next plan before a step ends. Knows no HTTP and no text.
"""

import logging
import math
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import trio

from dashinfer.config import ServerConfig
from dashinfer.engine.api import EngineState, EngineStats, PromptMedia
from dashinfer.engine.generation import SequenceGroup
from dashinfer.engine.media import MediaCache
from dashinfer.engine.pace import Pace
from dashinfer.engine.scheduler import Scheduler
from dashinfer.engine.sequence import Sequence
from dashinfer.errors import (
    ContextLengthExceeded,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    QueueFull,
    RequestError,
    StartupError,
    WorkerError,
)
from dashinfer.types import Encoded, ModelFiles, Progress, Ready, SamplingParams, StepResult, WorkerConfig
from dashinfer.worker.supervisor import COMMAND, WorkerGroup, one_error

logger = logging.getLogger("dashinfer.engine")

PLANS_AHEAD = 2  # one that runs, one that follows
LOAD_TIMEOUT = 3600.0  # seconds until every rank is ready
FAREWELL = 2.0  # seconds that requests have to report a failure to their clients
LONG_STEP = 30.0  # seconds after which a step that still runs is worth a warning
LATE = 1.0  # seconds past a deadline: noticed later than that, it passed while this process itself was stopped


class Engine:
    """Implements `dashinfer.engine.api.EngineAPI`. `run` is its life.

    A rank whose process lives and whose step does not end is given until `step_timeout`: a long step of a large model on a slow
    machine cannot be told from a hang. The engine stays ready meanwhile, and warns once.
    """

    def __init__(
        self,
        config: ServerConfig,
        files: ModelFiles,
        *,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        worker_command: Many[str] = COMMAND,
        pixel_values: bytes = b"",
    ) -> None:
        """`pixel_values`: see `dashinfer.types.WorkerConfig`; without them the model is served without its vision tower."""
        self.state: EngineState = "loading"
        self.info: Ready | None = None
        self._config = config
        self._on_progress = on_progress
        self._workers = WorkerGroup(
            [
                worker_config(config, files, rank, config.tensor_parallel, pixel_values)
                for rank in range(config.tensor_parallel)
            ],
            command=worker_command,
        )
        self._scheduler: Scheduler | None = None
        self._media_cache: MediaCache | None = None
        self._groups: dict[Sequence, SequenceGroup] = {}  # of every sequence that has not ended
        self._results: deque[StepResult] = deque()
        self._wake = trio.Event()  # work or results have come
        self._idle = trio.Event()  # set whenever no request is open
        self._idle.set()
        self._open = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0

    async def run(self, *, task_status: trio.TaskStatus[Ready] = trio.TASK_STATUS_IGNORED) -> None:
        """Load the model, then serve until cancelled; started with what was loaded.

        Raises:
            StartupError: the model cannot be served.
            WorkerError: a rank died or hung.

        Whatever ends it, every open request has been told.
        """
        try:
            with one_error():
                async with trio.open_nursery() as nursery:
                    with trio.move_on_after(LOAD_TIMEOUT) as loading:
                        self.info = await nursery.start(self._run_workers)
                    if loading.cancelled_caught:
                        raise StartupError(f"the model did not load within {LOAD_TIMEOUT:.0f} s")
                    if self.info.mode == "vlm":
                        self._media_cache = MediaCache(
                            capacity=self.info.media_cache_bytes, token_bytes=self.info.media_token_bytes
                        )
                    self._scheduler = Scheduler(
                        num_blocks=self.info.num_blocks,
                        block_size=self.info.block_size,
                        max_batch=self._config.max_batch,
                        max_step_tokens=self.info.max_step_tokens,
                        prefix_cache=not self._config.disable_prefix_cache,
                        media_cache=self._media_cache,
                    )
                    if self.state == "loading":
                        self.state = "ready"
                    task_status.started(self.info)
                    await self._drive(self._scheduler)
        except Exception as error:  # a broken invariant of ours too: what its requests are told must not be `shutting down`
            self.state = "failed"
            culprit = "the model's worker process" if isinstance(error, WorkerError | StartupError) else "the engine"
            self._fail_open_requests(InternalError(f"{culprit} failed; the request is lost"))
            with trio.move_on_after(FAREWELL):
                await self.drained()
            raise
        finally:
            self.state = "failed" if self.state == "failed" else "draining"
            self._fail_open_requests(EngineUnavailable("the server is shutting down"))

    def begin_drain(self) -> None:
        """Take no more requests; the open ones go on."""
        if self.state != "failed":
            self.state = "draining"

    async def drained(self) -> None:
        """Return once no request is open."""
        await self._idle.wait()

    def submit(self, prompt: list[int], params: list[SamplingParams], media: PromptMedia | None = None) -> SequenceGroup:
        """See `dashinfer.engine.api.EngineAPI.submit`."""
        if self.state != "ready":
            raise EngineUnavailable(f"the server is {self.state}")
        assert self._scheduler is not None and self.info is not None
        if not prompt:
            raise InvalidRequest("the prompt has no tokens", param="messages")
        if len(prompt) >= self.info.max_length:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt)} tokens; a context of {self.info.max_length} tokens leaves no room for an answer",
                param="messages",
            )
        if max(prompt) >= self.info.vocab_size or min(prompt) < 0:
            raise InvalidRequest(f"a token id is outside of the vocabulary of {self.info.vocab_size}", param="messages")
        queued = self._num_queued(self._scheduler)
        if queued >= self._config.max_queue:
            raise QueueFull(f"{queued} of at most {self._config.max_queue} requests are waiting already; try again later")
        assert media is None or self._media_cache is not None, "the model sees nothing"
        assert all(len(prompt) + each.max_tokens <= self.info.max_length for each in params)
        return SequenceGroup(prompt, params, media, on_enter=self._enter, on_exit=self._exit, on_stop=self._end)

    def stats(self) -> EngineStats:
        scheduler, media = self._scheduler, self._media_cache
        if scheduler is None:
            return EngineStats(0, 0, 0, 0, 0, 0, 0, 0)
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            total_blocks=scheduler.pool.num_blocks,
            used_blocks=scheduler.pool.num_used,
            cached_blocks=scheduler.pool.num_cached,
            preemptions=scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            media_queries=media.hits + media.misses if media is not None else 0,
            media_hits=media.hits if media is not None else 0,
        )

    def _num_queued(self, scheduler: Scheduler) -> int:
        """Requests of which nothing has run yet, and nothing can before others end. Preempted ones have run."""
        groups = {id(group): group for group in map(self._groups.__getitem__, scheduler.stuck())}
        return sum(not any(sequence.admitted for sequence in group.sequences) for group in groups.values())

    # -- the loop

    async def _run_workers(self, *, task_status: trio.TaskStatus[Ready]) -> None:
        await self._workers.run(
            on_progress=self._on_progress, on_result=self._on_result, on_encoded=self._on_encoded, task_status=task_status
        )

    def _on_encoded(self, message: Encoded) -> None:
        assert self._media_cache is not None
        self._media_cache.encoded(message.keys)
        self._wake.set()

    def _on_result(self, result: StepResult) -> None:
        self._results.append(result)
        self._wake.set()

    async def _drive(self, scheduler: Scheduler) -> None:
        """Keep the workers supplied and the requests informed."""
        steps: deque[_RunningStep] = deque()  # that the workers have
        cache = self._media_cache
        pace = Pace()
        while True:
            self._wake = trio.Event()
            while self._results:
                self._apply(scheduler, self._results.popleft())
                ended, now = steps.popleft(), trio.current_time()
                pace.observe(ended.tokens, now - ended.begun)
                if steps:  # the next step has only begun
                    steps[0].begun = now
            due = math.inf  # when there may be something to plan
            while scheduler.num_planned < PLANS_AHEAD:
                if steps and (due := steps[0].begun + pace.delay(steps[0].tokens)) > trio.current_time():
                    break
                plan = scheduler.schedule()
                if plan is not None:
                    self._note_admissions(scheduler.running[len(scheduler.running) - len(plan.enter) :])
                    await self._workers.send(plan)
                for message in cache.take_messages() if cache is not None else ():
                    await self._workers.send(message)
                if plan is None:
                    due = math.inf
                    break
                steps.append(_RunningStep(plan.step, sum(chunk.length for chunk in plan.chunks), trio.current_time()))
                due = math.inf
            if not self._results:
                await self._wait(steps[0] if steps else None, due)

    async def _wait(self, step: "_RunningStep | None", due: float) -> None:
        """Until work or results have come, it is due to plan, or it is time to warn of the running step. Raises WorkerError at
        its deadline."""
        if step is None:
            await self._wait_idle()
            return
        end = step.begun + self._config.step_timeout
        with trio.move_on_at(min(due, end if step.warned else min(end, step.begun + LONG_STEP))):
            await self._wake.wait()
        now = trio.current_time()
        if self._wake.is_set() or now >= due:
            return
        if now > end + LATE:
            # The whole server was stopped, by Ctrl-Z or with its machine. The workers were too: the step starts afresh.
            step.begun = now
        elif now >= end:
            raise WorkerError(f"the workers hang: no result of a step for {self._config.step_timeout:g} s")
        elif not step.warned and now >= step.begun + LONG_STEP:
            step.warned = True
            logger.warning("step %d has been running for %.0f s", step.number, now - step.begun)

    async def _wait_idle(self) -> None:
        """Until work or media have come. Raises WorkerError when ranks that do nothing but encode give no sign of it."""
        if self._media_cache is None or not self._media_cache.num_encoding:
            await self._wake.wait()
            return
        end = trio.current_time() + self._config.step_timeout
        with trio.move_on_at(end):
            await self._wake.wait()
        if not self._wake.is_set() and trio.current_time() <= end + LATE:
            raise WorkerError(f"the workers hang: no image or video encoded for {self._config.step_timeout:g} s")

    def _note_admissions(self, sequences: Many[Sequence]) -> None:
        for sequence in sequences:
            self._groups[sequence].admitted()

    def _apply(self, scheduler: Scheduler, result: StepResult) -> None:
        for update in scheduler.apply(result):
            group = self._groups.get(update.sequence)
            if group is None:
                continue  # another choice of the request failed in this very step
            if update.failed:
                group.fail(InternalError("the model gave no finite logits; try --data-type float32 or bfloat16"))
                for sequence in group.sequences:
                    self._end(sequence)
                continue
            self._generated_tokens += 1
            if update.finish:
                del self._groups[update.sequence]
            group.deliver(update)

    # -- what requests do

    def _enter(self, group: SequenceGroup) -> None:
        assert self._scheduler is not None
        self._open += 1
        self._idle = trio.Event()
        self._prompt_tokens += group.sequences[0].prompt_length
        for sequence in group.sequences:
            self._groups[sequence] = group
            self._scheduler.add(sequence)
        self._wake.set()

    def _exit(self, group: SequenceGroup) -> None:
        for sequence in group.sequences:
            self._end(sequence)
        self._open -= 1
        if self._open == 0:
            self._idle.set()

    def _end(self, sequence: Sequence) -> None:
        assert self._scheduler is not None
        self._scheduler.abort(sequence)
        self._groups.pop(sequence, None)
        self._wake.set()  # what it held may let another one in

    def _fail_open_requests(self, error: RequestError) -> None:
        for group in set(self._groups.values()):
            group.fail(error)


@dataclass
class _RunningStep:
    number: int
    tokens: int
    begun: float  # trio's time at which the workers had nothing before it to do
    warned: bool = False


def worker_config(
    config: ServerConfig, files: ModelFiles, rank: int, world_size: int, pixel_values: bytes = b""
) -> WorkerConfig:
    """What rank `rank` is told."""
    return WorkerConfig(
        rank=rank,
        world_size=world_size,
        files=files,
        device=config.device,
        data_type=config.data_type,
        load_format=config.load_format,
        max_batch=config.max_batch,
        max_length=config.max_length,
        max_step_tokens=config.max_step_tokens,
        block_size=config.block_size,
        kv_cache_memory=config.kv_cache_memory,
        media_cache_memory=config.media_cache_memory,
        log_level=config.log_level,
        gpu_memory_utilization=config.gpu_memory_utilization,
        enforce_eager=config.enforce_eager,
        deterministic=config.deterministic,
        quant_type=config.quant_type,
        quant_group_size=config.quant_group_size,
        quantize_head=config.quantize_head,
        kv_cache_dtype=config.kv_cache_dtype,
        vision=bool(pixel_values),
        vision_engine=config.vision_engine,
        pixel_values=pixel_values,
    )
