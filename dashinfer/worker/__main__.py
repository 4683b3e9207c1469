"""A rank: `python -m dashinfer.worker FD`, where FD is its end of the parent's socket pair, or a fork of
`python -m dashinfer.worker --template FD`, see `template`.

The main thread loads the model, executes plans and encodes images between them; one reads frames, and ends the process when the
socket closes, in the middle of a step if need be, so that no rank outlives its parent; one says once a second that the process
is alive; with a GPU, which is given steps before earlier ones have ended, one waits for their results.

Of several ranks, the first of the last stage says what became of steps, and the first says all else. A step or an image that
fails for want of memory ends them: others wait in the midst of the step, or have the image. A rank that is alone says so, and
goes on with an image less, or without that step and those after it until it is told that all begins anew.

Signals that a terminal or a service manager sends to the whole group are left to the parent.
"""

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from dashinfer.errors import InsufficientMemory, PeerLost, StartupError, WorkerError
from dashinfer.types import (
    Alive,
    Encode,
    Encoded,
    Failed,
    Forget,
    FromParent,
    FromWorker,
    Masks,
    OutOfMemory,
    Progress,
    Reset,
    Start,
    StepPlan,
)
from dashinfer.worker import template
from dashinfer.worker.frames import encode, worker_reader

if TYPE_CHECKING:
    from dashinfer.worker.executor import LaunchedStep
    from dashinfer.worker.masks import MaskInbox
    from dashinfer.worker.media import Media
    from dashinfer.worker.runner import Runner

logger = logging.getLogger("dashinfer.worker")

HEARTBEAT_INTERVAL = 1.0  # seconds
# Seconds of encoding images after each step: on CPU as long as the step took, up to so many; on a GPU always so many.
ENCODE_TIME = {"cpu": 0.1, "cuda": 0.01}
SMALL_MODEL = 16 << 20  # bytes of weights; a layer's product takes less time than threads take to meet when others run
SIGN_INTERVAL = 1.0  # seconds; so often the parent is told that a long encode goes on
POLL_INTERVAL = 5e-4  # seconds, while a GPU encodes and there is nothing else to do


class Connection:
    """The rank's end of the wire. Any thread may send; received messages wait in `inbox`, masks in `masks`."""

    def __init__(self, sock: socket.socket) -> None:
        self.inbox: queue.SimpleQueue[FromParent] = queue.SimpleQueue()
        self.masks: MaskInbox | None = None  # before the model is loaded
        self._socket = sock
        self._lock = threading.Lock()

    def start(self) -> None:
        for target in (self._read, self._beat):
            threading.Thread(target=target, daemon=True).start()

    def send(self, message: FromWorker) -> None:
        with self._lock:
            try:
                self._socket.sendall(encode(message))
            except OSError:
                os._exit(0)  # the parent is gone

    def _read(self) -> None:
        reader = worker_reader()
        while True:
            try:
                data = self._socket.recv(1 << 18)
            except OSError:
                data = b""
            if not data:
                os._exit(0)
            try:
                for message in reader.feed(data):
                    if isinstance(message, Masks):
                        assert self.masks is not None
                        self.masks.put(message)
                        continue
                    if isinstance(message, Reset) and self.masks is not None:
                        self.masks.interrupt()
                    self.inbox.put(message)
            except WorkerError as error:  # nothing more can be understood, and the main thread would wait for ever
                self.send(Failed("", str(error)))
                os._exit(1)

    def _beat(self) -> None:
        silence = threading.Event()
        while not silence.wait(HEARTBEAT_INTERVAL):
            self.send(Alive())


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    descriptor = int(sys.argv[-1])
    if "--template" in sys.argv:
        parent = socket.socket(fileno=descriptor)
        with template.beating(parent):
            prepare()
        descriptor = template.serve(parent)
    connection = Connection(socket.socket(fileno=descriptor))
    connection.start()
    _guarded(connection, partial(serve, connection))


def _guarded(connection: Connection, work: Callable[[], None]) -> None:
    """Do it; whatever it raises is told to the parent and ends the process."""
    try:
        work()
    except BaseException as error:
        kind = type(error).__name__ if isinstance(error, StartupError | PeerLost) else ""
        message = str(error) if kind else f"{type(error).__name__}: {error}"
        connection.send(Failed(kind, message, traceback.format_exc()))
        if not kind:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def prepare() -> None:
    """Import what all ranks do. What goes wrong goes wrong in the ranks again, which tell of it."""
    with suppress(Exception):
        import dashinfer.worker.runner  # noqa: F401
    # The collector would write to all of what is there, and every rank would have a copy.
    gc.collect()
    gc.freeze()


def serve(connection: Connection) -> None:
    """Load what the parent says, then execute its plans until the process ends."""
    start = connection.inbox.get()
    assert isinstance(start, Start)
    logging.basicConfig(level=start.config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)

    from dashinfer.models.config import ModelConfig

    # refuses an unknown architecture before torch is imported
    model_config = ModelConfig.from_hf(start.config.files.config, vision=True)

    from dashinfer.worker.distributed import peers_may_end
    from dashinfer.worker.runner import Runner

    def report(stage: str, done: int, total: int, unit: str) -> None:
        connection.send(Progress(stage, done, total, unit))

    with peers_may_end():
        runner = Runner(start.config, model_config, report)
        # What is there now stays: the collector need not look at it again, in the midst of a step.
        gc.collect()
        gc.freeze()
        if not runner.on_gpu:
            arrange_threads(runner.ready.weight_bytes)
        connection.masks = runner.masks
        connection.send(runner.ready)
        Loop(connection, runner, start.config.rank, start.config.world_size, start.config.pipeline_parallel).run()


def arrange_threads(weight_bytes: int) -> None:
    """On CPU, a core for each of torch's threads, or one thread for a small model."""
    import torch

    from dashinfer_kernels import pin_threads

    if weight_bytes < SMALL_MODEL:
        torch.set_num_threads(1)
    else:
        pin_threads()


class Loop:
    """What a rank does once it is ready: steps as their plans come, and images in between."""

    def __init__(self, connection: Connection, runner: "Runner", rank: int, world_size: int = 1, stages: int = 1) -> None:
        self._connection = connection
        self._runner = runner
        self._media: Media | None = runner.media
        # for all ranks; of images, too, which there are none of with several stages
        self._speaks = rank == world_size - world_size // stages
        self._alone = world_size == 1
        self._dropping = False  # plans, until a Reset
        self._steps: queue.SimpleQueue[LaunchedStep | OutOfMemory | Reset] = queue.SimpleQueue()
        self._told = time.perf_counter()  # when the parent was last told of encoding

    def run(self) -> None:
        """For ever."""
        if self._runner.on_gpu and self._speaks:
            threading.Thread(target=_guarded, args=(self._connection, self._send_results), daemon=True).start()
        while True:
            match self._receive():
                case StepPlan() as plan:
                    if not self._dropping:
                        self._execute(plan)
                case Reset() as message:
                    self._runner.reset()
                    self._runner.masks.resume()
                    self._dropping = False
                    if self._runner.on_gpu:
                        self._steps.put(message)
                case Encode() as message:
                    assert self._media is not None
                    self._media.ask(message)
                case Forget(keys):
                    assert self._media is not None
                    self._media.forget(keys)
                case message:
                    raise AssertionError(f"unexpected: {message}")

    def _receive(self) -> FromParent:
        """The next message; until there is one, images are encoded."""
        inbox, media = self._connection.inbox, self._media
        while media is not None and media.pending:
            try:
                return inbox.get(timeout=POLL_INTERVAL) if media.running else inbox.get_nowait()
            except queue.Empty:
                self._encode(media, ENCODE_TIME["cuda"] if self._runner.on_gpu else 0)
        return inbox.get()

    def _execute(self, plan: StepPlan) -> None:
        begun = time.perf_counter()
        try:
            step = self._runner.launch(plan)
            if self._speaks and self._runner.on_gpu:
                self._steps.put(step)
            elif self._speaks:
                self._connection.send(self._runner.result(step))
        except InsufficientMemory as error:
            if not self._alone:
                raise
            self._dropping = True
            logger.warning("step %d is dropped: %s", plan.step, error)
            if self._media is not None:
                self._tell_encoded(self._media)  # the parent must know first what the step may have failed for
            if self._runner.on_gpu:
                self._steps.put(OutOfMemory(plan.step))  # behind the results of earlier steps
            else:
                self._connection.send(OutOfMemory(plan.step))
            return
        if self._media is not None:
            on_gpu = self._runner.on_gpu
            self._encode(self._media, ENCODE_TIME["cuda"] if on_gpu else min(time.perf_counter() - begun, ENCODE_TIME["cpu"]))

    def _encode(self, media: "Media", seconds: float) -> None:
        """A slice, unless the last one is still under way, and tell what is there, or now and then that it goes on."""
        advanced = media.pending and not media.running
        if advanced:
            media.advance(seconds)
        self._tell_encoded(media, sign=advanced)

    def _tell_encoded(self, media: "Media", *, sign: bool = False) -> None:
        """What is new, and with `sign`, now and then, that there is nothing."""
        keys, failed, now = media.take_new(), media.take_failed(), time.perf_counter()
        for error in failed.values():
            if not self._alone:
                raise error
            logger.warning("an image or a video is given up: %s", error)
        if self._speaks and (keys or failed or (sign and now >= self._told + SIGN_INTERVAL)):
            self._connection.send(Encoded(keys, list(failed)))
            self._told = now

    def _send_results(self) -> None:
        """Wait for each step's result and send it, while the main thread queues the steps after it."""
        dropping = False
        while True:
            step = self._steps.get()
            if isinstance(step, Reset):
                dropping = False
            elif dropping:
                pass
            elif isinstance(step, OutOfMemory):
                dropping = True
                self._connection.send(step)
            else:
                try:
                    self._connection.send(self._runner.result(step))
                except InsufficientMemory as error:
                    if not self._alone:
                        raise
                    dropping = self._dropping = True
                    logger.warning("step %d is dropped: %s", step.number, error)
                    self._connection.send(OutOfMemory(step.number))


if __name__ == "__main__":
    main()
