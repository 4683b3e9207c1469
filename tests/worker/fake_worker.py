"""A worker process without a model, for tests of what supervises it: `python fake_worker.py MODE FD`, or a template of such
ones: `python fake_worker.py MODE --template FD`.

The mode says how it behaves: `good` serves the fake rank's tokens, `slow` takes 50 ms a step, `overflow` gives no finite logits
after the token 49. While loading `refuse` fails, `crash` breaks, `lost` dies, `loading` never ends, `frozen` stops the whole
process, and `away` writes where the ranks are to meet; of `uneven` ranks the later ones have fewer blocks. At its third step
`die` ends, `late` does so after 0.2 s, `killed` kills itself, `realtime` does so with a signal that has no name, `hang` never
answers, `stopped` stops the whole process, `talk` writes a line that does not end, `garbage` sends no frame, `lonely` says that
it lost another rank, `closed` ends its side of the connection and lives on, and `short` has no memory for the step. Of `chatty`
ranks all send results. `mother` starts another process, writes its number, and ends, and `naked` writes what it was born with.

Modes with commas between them are those of the ranks, the last one also that of all that follow. With the mode `named` they are
the name of the model's files.

A template that is `threaded` starts a thread, one that is `stuck` stops, and one that is `broken` dies. At its first fork one
that is `wordy` writes more than anybody reads, and one that is `falling` fails.

`seeing` takes a second to encode an image and says four times that it goes on; `blind` never does either.

Three modes run the real `serve` over a fake GPU, on which a step has no result before the next one is launched: `queued` goes
on for ever, `illegal` fails in the third result, and `exhausted` in the third launch.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import msgspec

from dashinfer.errors import InsufficientMemory, UnsupportedModel
from dashinfer.models.config import ModelConfig
from dashinfer.types import Encode, Encoded, Failed, OutOfMemory, Progress, Ready, StepPlan, StepResult, WorkerConfig
from dashinfer.worker import __main__ as worker
from dashinfer.worker.masks import MaskInbox
from tests.engine.fake_rank import FakeRank

begin_rank = worker.template._Template._begin
MODES = sys.argv.pop(1).split(",")
MODE = MODES[0]
READY = Ready(
    architecture="FakeForCausalLM",
    mode="llm",
    device="cpu",
    data_type="float32",
    vocab_size=50,
    max_length=64,
    max_step_tokens=32,
    block_size=4,
    num_blocks=64,
    weight_bytes=0,
    kv_cache_bytes=0,
)


def misbehave(connection: worker.Connection) -> None:
    match MODE:
        case "die" | "late":
            if MODE == "late":
                time.sleep(0.2)
            print("the fake rank's last words", file=sys.stderr, flush=True)
            os._exit(3)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(3600)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "realtime":
            os.kill(os.getpid(), signal.SIGRTMIN + 1)
        case "talk":
            sys.stderr.write("x" * 100_000)
            sys.stderr.flush()
        case "garbage":
            connection._socket.sendall(b"\xff" * 64)
        case "lonely":
            connection.send(Failed("PeerLost", "connection closed by peer"))
            time.sleep(3600)
        case "closed":
            connection.send = lambda message: None
            connection._socket.shutdown(socket.SHUT_WR)
            time.sleep(3600)
        case "short":
            connection.send(OutOfMemory(2))
        case "mother":
            child = subprocess.Popen(["sleep", "60"])
            print(f"child {child.pid}", file=sys.stderr, flush=True)
            os._exit(3)
        case "naked":
            print(json.dumps(birth()), file=sys.stderr, flush=True)


def birth() -> dict[str, object]:
    """What a process has from whoever started it."""
    files = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.exists()]
    return {
        "environment": sorted(f"{name}={value}"[:64] for name, value in os.environ.items()),
        "files": sorted(file if file.startswith("/") else file.partition(":")[0] for file in files),
        "outputs": os.fstat(1) == os.fstat(2),
        "leader": os.getpgid(0) == os.getpid(),
        "ignored": sorted(number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN),
        "cores": sorted(os.sched_getaffinity(0)),
        "directory": os.getcwd(),
    }


def prepare() -> None:
    if MODE == "threaded":
        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    if MODE == "stuck":
        os.kill(os.getpid(), signal.SIGSTOP)
    if MODE == "broken":
        print("the fake template's last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if MODE in ("wordy", "falling"):
        worker.template._Template._begin = fall if MODE == "falling" else babble


def babble(*arguments: Any) -> None:
    with suppress(BlockingIOError):
        while True:
            os.write(2, b"x\n" * 1000)
    begin_rank(*arguments)


def fall(*_: object) -> None:
    raise RuntimeError("something in the template broke")


def fake_rank(config: WorkerConfig) -> FakeRank:
    return FakeRank(
        num_blocks=READY.num_blocks,
        block_size=READY.block_size,
        max_batch=config.max_batch,
        max_step_tokens=READY.max_step_tokens,
        media_tokens=64,
        poison=49 if MODE == "overflow" else None,
    )


class QueuedStep:
    def __init__(self, result: StepResult) -> None:
        self._result = result
        self.number = result.step
        self.followed = threading.Event()

    def result(self) -> StepResult:
        self.followed.wait()
        if MODE == "illegal" and self._result.step == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self._result


class QueuingRunner:
    """In the place of `dashinfer.worker.runner.Runner`."""

    on_gpu = True
    ready = READY
    media = None
    masks = MaskInbox()

    def __init__(self, config: WorkerConfig, *_: object) -> None:
        self._rank = fake_rank(config)
        self._last: QueuedStep | None = None

    def launch(self, plan: StepPlan) -> QueuedStep:
        if self._last is not None:
            self._last.followed.set()
        if MODE == "exhausted" and plan.step == 2:
            raise InsufficientMemory("fake: memory ran out in a step")
        self._last = QueuedStep(self._rank.execute(plan))
        return self._last

    def result(self, step: QueuedStep) -> StepResult:
        return step.result()

    def reset(self) -> None:
        self._rank.reset()


def serve(connection: worker.Connection) -> None:
    global MODE
    start = connection.inbox.get()
    config = start.config
    modes = config.files.name.split(",") if MODES == ["named"] else MODES
    MODE = modes[min(config.rank, len(modes) - 1)]
    if MODE in ("queued", "illegal", "exhausted"):
        module = sys.modules["dashinfer.worker.runner"] = ModuleType("dashinfer.worker.runner")
        module.Runner = QueuingRunner
        ModelConfig.from_hf = staticmethod(lambda config, vision: None)
        connection.inbox.put(start)
        real_serve(connection)
    speaks = MODE == "chatty" or config.rank == config.world_size - config.world_size // config.pipeline_parallel
    if MODE == "refuse":
        raise UnsupportedModel("this model is not supported")
    if MODE == "crash":
        raise RuntimeError("something broke")
    if MODE == "lost":
        print("out of something", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if MODE == "away":
        print(f"meets at {config.rendezvous}", file=sys.stderr, flush=True)
    if MODE == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    connection.send(Progress("weights", 1, 2))
    if MODE == "loading":
        time.sleep(3600)
    num_blocks = READY.num_blocks - 5 * config.rank if MODE == "uneven" else READY.num_blocks
    ready = msgspec.structs.replace(READY, num_blocks=num_blocks)
    if MODE in ("seeing", "blind"):
        ready = msgspec.structs.replace(ready, mode="vlm", vocab_size=100, media_cache_bytes=64, media_token_bytes=1)
    connection.send(ready)
    rank = fake_rank(config)
    while True:
        plan = connection.inbox.get()
        if isinstance(plan, Encode):
            rank.tell(plan)
            for _ in range(4 if MODE == "seeing" else 0):
                time.sleep(0.25)
                connection.send(Encoded([]))
            if MODE == "seeing":
                connection.send(Encoded(rank.encode(1)))
            continue
        assert isinstance(plan, StepPlan)
        if plan.step == 2:
            misbehave(connection)
        if MODE == "slow":
            time.sleep(0.05)
        result = rank.execute(plan)
        if speaks:
            connection.send(result)


if __name__ == "__main__":
    worker.HEARTBEAT_INTERVAL = 0.1  # silence is noticed sooner
    real_serve, worker.serve, worker.prepare = worker.serve, serve, prepare
    worker.main()
