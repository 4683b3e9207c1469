"""How long the ranks of a model take to start, and how much of that is reading weights: the engine alone, without a server."""

from dataclasses import dataclass

import trio

from dashinfer.config import ServerConfig
from dashinfer.serving.backend import ModelBackend
from dashinfer.types import Progress


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Seconds."""

    start: float  # from the start of the processes until they are ready
    weights: float  # from the first hundredth that has been read to the last


async def time_loading(config: ServerConfig) -> Loading:
    """Start the ranks once, and end them. The model is there, or is fetched first."""
    backend = ModelBackend()
    source = await trio.to_thread.run_sync(backend.resolve, config, lambda *progress: None)
    times: list[float] = []

    def note(progress: Progress) -> None:
        if progress.stage == "weights":
            times.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        begun = trio.current_time()
        await nursery.start(backend.engine(config, source, note).run)
        ready = trio.current_time()
        nursery.cancel_scope.cancel()
    return Loading(start=ready - begun, weights=times[-1] - times[0] if times else 0.0)
