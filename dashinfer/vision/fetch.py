"""The bytes of images and videos, wherever a request says they are: http(s) and data: URLs, and files where that is allowed.

Whoever sends a request chooses the source, so every source is hostile: `MediaPolicy` says what may be asked and what it may
cost. Knows nothing of what the bytes mean. Runs on trio, in the parent.
"""

import math
from collections.abc import Awaitable, Callable

import trio

from dashinfer.errors import MediaError
from dashinfer.vision.data_uri import decode_data_uri
from dashinfer.vision.http import get
from dashinfer.vision.local_file import read_file
from dashinfer.vision.network import Internet, Network
from dashinfer.vision.policy import MediaPolicy
from dashinfer.vision.url import parse_url, resolve_location

MAX_REDIRECTS = 3
_INTERNET = Internet()

# Called with the bytes that a medium is about to have; returns once there is room for them.
MakeRoom = Callable[[int], Awaitable[None]]


async def _unlimited(size: int) -> None:
    """There is always room."""


async def fetch(
    source: str,
    policy: MediaPolicy,
    *,
    index: int = 0,
    network: Network = _INTERNET,
    make_room: MakeRoom = _unlimited,
    threads: trio.CapacityLimiter | None = None,
) -> bytes:
    """The bytes of one medium, at least one.

    Args:
        source: an http:, https: or data: URL, or a file: URL or absolute path under `policy.allowed_path`.
        index: the medium's place among the request's, for the error.
        network: what to resolve and connect with.
        make_room: awaited before memory is taken; the time it takes does not count.
        threads: limits those that decode data: URLs.

    Raises:
        MediaError: refused by the policy, not had, empty, larger than `policy.max_bytes`, or not there in `policy.timeout`
            seconds.
    """
    try:
        with trio.move_on_after(policy.timeout) as scope:

            async def wait_for_room(size: int) -> None:
                left = scope.deadline - trio.current_time()
                scope.deadline = math.inf
                await make_room(size)
                scope.deadline = trio.current_time() + left

            content = await _fetch(source.strip(), policy, network, wait_for_room, threads)
        if scope.cancelled_caught:
            raise MediaError(f"fetching it took longer than {policy.timeout:g} seconds")
        if not content:
            raise MediaError("it is empty")
    except MediaError as error:
        raise MediaError(error.reason, index=index) from error
    return content


async def _fetch(
    source: str, policy: MediaPolicy, network: Network, make_room: MakeRoom, threads: trio.CapacityLimiter | None
) -> bytes:
    scheme = source[:8].partition(":")[0].lower()
    if scheme in ("http", "https"):
        return await _fetch_http(source, policy, network, make_room)
    # In a thread, which a deadline leaves behind: large texts take long, and a file may lie on a disk that does not answer.
    if scheme == "data":
        await make_room(min(len(source), policy.max_bytes))
        return await trio.to_thread.run_sync(decode_data_uri, source, policy.max_bytes, abandon_on_cancel=True, limiter=threads)
    if scheme == "file" or source.startswith("/"):
        await make_room(policy.max_bytes)
        return await trio.to_thread.run_sync(read_file, source, policy.allowed_path, policy.max_bytes, abandon_on_cancel=True)
    raise MediaError("it is none of an http:, https:, data: and file: URL")


async def _fetch_http(source: str, policy: MediaPolicy, network: Network, make_room: MakeRoom) -> bytes:
    url = parse_url(source)
    for _ in range(MAX_REDIRECTS + 1):
        answer = await get(url, policy, network, make_room)
        if isinstance(answer, bytes):
            return answer
        target = resolve_location(url, answer.location)
        if (url.scheme, target.scheme) == ("https", "http"):
            raise MediaError("it is redirected from https to http")
        url = target
    raise MediaError(f"it is redirected more than {MAX_REDIRECTS} times")
