"""The engine: requests go in, tokens come out, and the workers never wait for Python.

Owns the worker group, the scheduler and the open requests, and the one loop that moves work between them. While there is work,
the workers have their next plan before a step ends. Knows no HTTP and no text.

When workers fail, others start in their place, and what was not finished is computed again from the tokens that are known:
requests wait meanwhile, and lose nothing.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import msgspec
import trio

from dashinfer.config import ServerConfig
from dashinfer.engine.api import EngineState, EngineStats, PromptMedia, Workers
from dashinfer.engine.generation import SequenceGroup
from dashinfer.engine.masking import compute_masks
from dashinfer.engine.media import MediaCache
from dashinfer.engine.pace import Pace
from dashinfer.engine.recovery import Recovery, StepLimits
from dashinfer.engine.routing import Outlook
from dashinfer.engine.scheduler import Scheduler
from dashinfer.engine.sequence import Sequence
from dashinfer.errors import (
    ContextLengthExceeded,
    EngineUnavailable,
    InsufficientMemory,
    InternalError,
    InvalidRequest,
    QueueFull,
    RequestError,
    StartupError,
    WorkerError,
)
from dashinfer.guidance.guide import Grammar, Guide
from dashinfer.types import (
    Encoded,
    Masks,
    ModelFiles,
    OutOfMemory,
    Progress,
    Ready,
    Reset,
    SamplingParams,
    StepResult,
    WorkerConfig,
)
from dashinfer.worker.supervisor import WorkerGroup, one_error

logger = logging.getLogger("dashinfer.engine")

LOAD_TIMEOUT = 3600.0  # seconds until every rank is ready
FAREWELL = 2.0  # seconds that requests have to report a failure to their clients
LONG_STEP = 30.0  # seconds after which a step that still runs is worth a warning
LATE = 1.0  # seconds past a deadline: noticed later than that, it passed while this process itself was stopped
LEAST_JUMP = 3  # tokens that a grammar forces, from which on they are computed together
SIZES = ("vocab_size", "max_length", "max_step_tokens", "num_blocks", "media_cache_bytes")  # that workers must have again


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
        make_workers: Callable[[Many[WorkerConfig]], Workers] = WorkerGroup,
        within: AbstractContextManager[object] = nullcontext(),  # noqa: B008 - it has no state
        pixel_values: bytes = b"",
        replica: int = 0,
    ) -> None:
        """`make_workers` is called at each start; `within` is entered before, and left at the end. `pixel_values`: see
        `dashinfer.types.WorkerConfig`; without them the model is served without its vision tower. `replica`: which of the
        `data_parallel` copies of the model this is."""
        self.state: EngineState = "loading"
        self.info: Ready | None = None
        self._config = config
        self._on_progress = on_progress
        self._make_workers = make_workers
        self._within = within
        self._worker_configs = [
            worker_config(config, files, rank, replica=replica, pixel_values=pixel_values)
            for rank in range(config.tensor_parallel * config.pipeline_parallel)
        ]
        self._scheduler: Scheduler | None = None
        self._media_cache: MediaCache | None = None
        self._limits: StepLimits | None = None
        self._recovery: Recovery[Sequence] = Recovery(max_restarts=config.max_restarts, window=config.restart_window)
        self._failed_at = 0.0  # trio's time of the first failure since workers were ready
        self._pace = Pace()
        self._jumps = False  # whether tokens that a grammar forces are computed together
        self._groups: dict[Sequence, SequenceGroup] = {}  # of every sequence that has not ended
        self._wake = trio.Event()  # work or results have come
        self._idle = trio.Event()  # set whenever no request is open
        self._idle.set()
        self._open = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._restarts = 0  # of workers, that were ready again

    async def run(self, *, task_status: trio.TaskStatus[Ready] = trio.TASK_STATUS_IGNORED) -> None:
        """Load the model, then serve until cancelled; started with what was loaded.

        Raises:
            StartupError: the model cannot be served.
            WorkerError: a rank died or hung before it was loaded, or too often.

        Whatever ends it, every open request has been told.
        """
        try:
            with self._within:
                while True:
                    life = _Life(self._make_workers(self._worker_configs))
                    try:
                        with _cancelled_first():
                            await self._live(life, task_status)
                    except (WorkerError, StartupError) as error:
                        if self._scheduler is None:
                            raise
                        await trio.sleep(self._recover(life, error))
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

    def submit(
        self,
        prompt: list[int],
        params: list[SamplingParams],
        media: PromptMedia | None = None,
        grammar: Grammar | None = None,
    ) -> SequenceGroup:
        """See `dashinfer.engine.api.EngineAPI.submit`."""
        if self.state not in ("ready", "recovering"):
            raise EngineUnavailable(f"the server is {self.state}")
        self.check(prompt)
        assert self._scheduler is not None and self.info is not None
        if (queued := self.num_queued) >= self._config.max_queue:
            raise QueueFull(f"{queued} of at most {self._config.max_queue} requests are waiting already; try again later")
        assert media is None or self._media_cache is not None, "the model sees nothing"
        assert all(len(prompt) + each.max_tokens <= self.info.max_length for each in params)
        return SequenceGroup(prompt, params, media, grammar, on_enter=self._enter, on_exit=self._exit, on_stop=self._end)

    def check(self, prompt: list[int]) -> None:
        """Raises ContextLengthExceeded and InvalidRequest as `submit` does."""
        assert self.info is not None, "not loaded yet"
        if not prompt:
            raise InvalidRequest("the prompt has no tokens", param="messages")
        if len(prompt) >= self.info.max_length:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt)} tokens; a context of {self.info.max_length} tokens leaves no room for an answer",
                param="messages",
            )
        if max(prompt) >= self.info.vocab_size or min(prompt) < 0:
            raise InvalidRequest(f"a token id is outside of the vocabulary of {self.info.vocab_size}", param="messages")

    def outlook(self, prompt: list[int], hashes: list[bytes]) -> Outlook:
        """See `dashinfer.engine.replicas.Replica`."""
        scheduler = self._scheduler
        assert scheduler is not None, "not loaded yet"
        return Outlook(
            cached_blocks=len(scheduler.pool.match(hashes)),
            admits=scheduler.can_admit(len(prompt)),
            sequences=len(scheduler.running) + len(scheduler.waiting),
            tokens=scheduler.num_tokens,
        )

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
            restarts=self._restarts,
        )

    @property
    def num_queued(self) -> int:
        """Requests of which nothing has run yet, and nothing can before others end. Preempted ones have run."""
        stuck = self._scheduler.stuck() if self._scheduler is not None else []
        groups = {id(group): group for group in map(self._groups.__getitem__, stuck)}
        return sum(not any(sequence.admitted for sequence in group.sequences) for group in groups.values())

    # -- the workers' lives

    async def _live(self, life: "_Life", task_status: trio.TaskStatus[Ready]) -> None:
        """One life of the workers, which ends with an error: StartupError or WorkerError where it is theirs."""
        with one_error():
            async with trio.open_nursery() as nursery:
                with trio.move_on_after(LOAD_TIMEOUT) as loading:
                    info = await nursery.start(self._run_workers, life)
                if loading.cancelled_caught:
                    raise StartupError(f"the model did not load within {LOAD_TIMEOUT:.0f} s")
                life.ready_at = life.busy_at = trio.current_time()
                if self.info is None:
                    self._prepare(info)
                    if self.state == "loading":
                        self.state = "ready"
                    task_status.started(info)
                else:
                    _compare(info, self.info)
                    self._restarts += 1
                    if self.state == "recovering":
                        self.state = "ready"
                    seconds = life.ready_at - self._failed_at
                    logger.info("workers are ready again after %.1f s; %d requests go on", seconds, self._open)
                with self._watched():
                    await self._drive(life)

    async def _run_workers(self, life: "_Life", *, task_status: trio.TaskStatus[Ready]) -> None:
        def on_said(message: StepResult | OutOfMemory) -> None:
            life.said.append(message)
            self._wake.set()

        def on_encoded(message: Encoded) -> None:
            if not life.over:
                assert self._media_cache is not None
                self._media_cache.encoded(message.keys)
                self._lose_media(message.failed)
                self._wake.set()

        with self._watched():
            await life.workers.run(
                on_progress=self._on_progress,
                on_result=on_said,
                on_encoded=on_encoded,
                on_memory=on_said,
                task_status=task_status,
            )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Tell of a failure at once, and not only when all ranks have ended."""
        try:
            yield
        except (WorkerError, StartupError):
            if self.state == "ready":
                self.state = "recovering"
            raise

    def _prepare(self, info: Ready) -> None:
        """The model is loaded for the first time. Workers that start later must be the same."""
        self.info = info
        self._jumps = info.device == "cpu"  # a GPU's graphs are for one token a sequence
        self._worker_configs = [msgspec.structs.replace(each, num_blocks=info.num_blocks) for each in self._worker_configs]
        if info.mode == "vlm":
            capacity = info.media_cache_bytes
            self._media_cache = MediaCache(capacity=capacity, token_bytes=info.media_token_bytes)
            self._worker_configs = [msgspec.structs.replace(each, media_cache_memory=capacity) for each in self._worker_configs]
        self._limits = StepLimits(sequences=self._config.max_batch, tokens=info.max_step_tokens, least=info.block_size)
        self._scheduler = Scheduler(
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            max_batch=self._config.max_batch,
            max_step_tokens=info.max_step_tokens,
            prefix_cache=not self._config.disable_prefix_cache,
            media_cache=self._media_cache,
            stages=self._config.pipeline_parallel,
        )

    def _recover(self, life: "_Life", error: WorkerError | StartupError) -> float:
        """The workers are gone. Make ready for others, and say in how many seconds to start them.

        Raises:
            WorkerError: that would be in vain.
        """
        assert self._scheduler is not None and self._limits is not None
        now = trio.current_time()
        if life.ready_at is not None:
            self._failed_at = now
        self._take(life)
        life.over = True
        busy = self._scheduler.num_planned > 0
        encoding = self._media_cache is not None and self._media_cache.num_encoding > 0
        smaller = False
        if isinstance(error, InsufficientMemory) and busy and not encoding:
            sequences, tokens = self._scheduler.oldest_plan
            smaller = self._limits.shrink(len(sequences), tokens)
        struck = self._scheduler.recover()
        self._set_limits()
        delay = 0.0
        if not smaller:
            idle = 0.0 if busy or encoding or life.ready_at is None else now - life.busy_at
            verdict = self._recovery.failure(struck, now=now, idle=idle)
            if verdict.delay is None:
                raise error if isinstance(error, WorkerError) else WorkerError(f"workers cannot start again: {error}")
            self._give_up(verdict.culprits, "workers failed each time that this request was computed")
            self._give_up(verdict.victims, "workers fail too often; the request is lost")
            delay = verdict.delay
        logger.warning("%s; workers start again%s", error, f" in {delay:g} s" if delay else "")
        return delay

    def _give_up(self, sequences: Iterable[Sequence], why: str) -> None:
        """Fail the requests of these sequences."""
        for group in {id(group): group for sequence in sequences if (group := self._groups.get(sequence))}.values():
            logger.warning("a request of %d tokens is given up: %s", group.sequences[0].prompt_length, why)
            self._fail(group, InternalError(why))

    # -- the loop

    async def _drive(self, life: "_Life") -> None:
        """Keep the workers supplied and the requests informed."""
        assert self._scheduler is not None
        scheduler, cache, steps = self._scheduler, self._media_cache, life.steps
        while True:
            self._wake = trio.Event()
            if self._take(life):
                await life.workers.send(Reset())
            await self._send_masks(life)
            due = math.inf  # when there may be something to plan
            # a plan that runs in each stage, one that follows
            while scheduler.num_planned <= scheduler.stages and self._isolated(scheduler):
                if (
                    steps
                    and scheduler.next_step >= steps[0].number + scheduler.stages  # no stage wants for it yet
                    and (due := steps[0].entered + self._pace.delay(steps[0].tokens)) > trio.current_time()
                ):
                    break
                plan = scheduler.schedule()
                if plan is not None:
                    now = trio.current_time()
                    # before anything is waited for: the result may be there first, and the workers gone
                    steps.append(_RunningStep(plan.step, sum(chunk.length for chunk in plan.chunks), now, now))
                    self._note_admissions(scheduler.running[len(scheduler.running) - len(plan.enter) :])
                    await life.workers.send(plan)
                    await self._send_masks(life)
                for message in cache.take_messages() if cache is not None else ():
                    await life.workers.send(message)
                due = math.inf
                if plan is None:
                    break
            if not life.said:
                await self._wait(steps[0] if steps else None, due)

    async def _send_masks(self, life: "_Life") -> None:
        """Tell the ranks what the sequences that follow a grammar may say next, as far as that is known."""
        assert self._scheduler is not None
        while (masks_due := self._scheduler.masks_due()) is not None:
            step, sequences = masks_due
            guides = {row: sequence.guide for row, sequence in sequences.items() if sequence.guide is not None}
            masks = await compute_masks(guides)
            for row in guides.keys() - masks.keys():
                self._fail_guided(sequences[row])
            await life.workers.send(Masks(step, tuple(masks), b"".join(masks.values())))

    def _take(self, life: "_Life") -> bool:
        """Apply what the workers have said. True if they have run out of memory, and drop all plans until `Reset`."""
        assert self._scheduler is not None and self._limits is not None
        steps = life.steps
        while life.said:
            message = life.said.popleft()
            if isinstance(message, OutOfMemory):
                self._make_smaller(self._scheduler)
                steps.clear()
                life.said.clear()
                return True
            self._apply(self._scheduler, message)
            self._recovery.step()
            self._limits.good_step()
            self._set_limits()
            ended, now = steps.popleft(), trio.current_time()
            life.busy_at = now
            self._pace.observe(ended.tokens, now - ended.entered)
            if steps:  # the next step has only begun
                steps[0].begun = now
            for step in steps:
                if step.number >= ended.number + self._scheduler.stages:
                    step.entered = now
        return False

    def _make_smaller(self, scheduler: Scheduler) -> None:
        """Memory ran out in the oldest step. Compute it again in smaller ones."""
        assert self._limits is not None
        sequences, tokens = scheduler.oldest_plan
        smaller = self._limits.shrink(len(sequences), tokens)
        scheduler.recover(media_lost=False)
        if smaller:
            logger.warning(
                "memory ran out in a step of %d sequences and %d tokens; steps have at most %d and %d for a while",
                *(len(sequences), tokens, self._limits.sequences, self._limits.tokens),
            )
        else:
            self._give_up(sequences, "memory ran out while this request was computed alone")
        self._set_limits()

    def _set_limits(self) -> None:
        assert self._scheduler is not None and self._limits is not None
        self._scheduler.max_running, self._scheduler.max_step_tokens = self._limits.sequences, self._limits.tokens

    def _isolated(self, scheduler: Scheduler) -> bool:
        """See to it that a suspect is computed alone. False: what the workers have must end first."""
        if scheduler.alone is not None and self._recovery.is_suspect(scheduler.alone):
            return True
        suspect = self._recovery.suspect()
        if suspect is not scheduler.alone:
            if scheduler.num_planned:
                return False
            scheduler.isolate(suspect)
        return True

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
            # This process was stopped, by Ctrl-Z or with its machine: what came meanwhile is yet to be read, or the step
            # stood still, too. It starts afresh.
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
                self._fail(group, InternalError("the model gave no finite logits; try --data-type float32 or bfloat16"))
                continue
            self._generated_tokens += 1
            self._recovery.token(update.sequence)
            if update.finish:
                del self._groups[update.sequence]
            group.deliver(update)
            if update.finish is None and update.sequence.guide is not None:
                self._advance(scheduler, update.sequence, update.sequence.guide, update.token)

    def _lose_media(self, keys: list[bytes]) -> None:
        """Ranks have no memory to encode these."""
        assert self._media_cache is not None
        holders = self._media_cache.failed(keys)
        lost = [sequence for sequence in self._groups if sequence in holders]
        self._give_up(lost, "memory ran out while an image or a video of this request was encoded")

    def _advance(self, scheduler: Scheduler, sequence: Sequence, guide: Guide, token: int) -> None:
        """A sequence that follows a grammar has said this, and says at once what must follow if that is much."""
        guide.advance(token)
        if guide.error is None and self._jumps and can_jump(sequence) and len(forced := guide.forced()) >= LEAST_JUMP:
            group = self._groups[sequence]
            for update in scheduler.force(sequence, forced):
                self._generated_tokens += 1
                if update.finish:
                    del self._groups[sequence]
                else:
                    guide.advance(update.token)
                group.deliver(update)
        if guide.error is not None:
            self._fail_guided(sequence)

    def _fail_guided(self, sequence: Sequence) -> None:
        """Its guide is in error."""
        group = self._groups.get(sequence)
        if group is not None:
            assert sequence.guide is not None
            param = sequence.guide.param
            self._fail(group, InvalidRequest(f"`{param}` is too complex to follow: {sequence.guide.error}", param=param))

    def _fail(self, group: SequenceGroup, error: RequestError) -> None:
        group.fail(error)
        for sequence in group.sequences:
            self._end(sequence)

    # -- what requests do

    def _enter(self, group: SequenceGroup) -> None:
        assert self._scheduler is not None
        self._open += 1
        if self._idle.is_set():
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
        self._recovery.forget(sequence)
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
    entered: float  # and at which the first stage could begin it
    warned: bool = False


class _Life:
    """A worker group from its start to its failure.

    Attributes:
        steps: that it has.
        said: what it has said and is not applied yet, in order.
        ready_at: when it was ready, on trio's clock; None: it has never been.
        busy_at: when it was last known to do something.
        over: it has failed, and nothing that it says counts any more.
    """

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.steps: deque[_RunningStep] = deque()
        self.said: deque[StepResult | OutOfMemory] = deque()
        self.ready_at: float | None = None
        self.busy_at = 0.0
        self.over = False


def can_jump(sequence: Sequence) -> bool:
    """Whether nothing is asked of a sequence's tokens that only sampling gives them."""
    params = sequence.params
    penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    return params.logprobs is None and not penalised


@contextmanager
def _cancelled_first() -> Iterator[None]:
    """Whoever is cancelled while workers fail is cancelled."""
    try:
        yield
    except BaseExceptionGroup as group:
        cancelled, others = group.split(trio.Cancelled)
        if cancelled is None or (others is not None and others.split((WorkerError, StartupError))[1] is not None):
            raise
        raise cancelled from None


def _compare(again: Ready, first: Ready) -> None:
    """Raises WorkerError if workers that started again are not as large as those before them."""
    if again.block_size != first.block_size or any(getattr(again, name) < getattr(first, name) for name in SIZES):
        changed = [name for name in ("block_size", *SIZES) if getattr(again, name) != getattr(first, name)]
        sizes = ", ".join(f"{name} {getattr(again, name)}, not {getattr(first, name)}" for name in changed)
        raise WorkerError(f"workers that started again have {sizes}")


def worker_config(
    config: ServerConfig, files: ModelFiles, rank: int, *, replica: int = 0, pixel_values: bytes = b""
) -> WorkerConfig:
    """What rank `rank` of a replica is told. All ranks of all replicas are dealt over the machines in order."""
    world_size = config.tensor_parallel * config.pipeline_parallel
    local_size = config.data_parallel * world_size // config.nnodes
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
        pipeline_parallel=config.pipeline_parallel,
        local_rank=(replica * world_size + rank) % local_size,
        local_size=local_size,
    )
