"""The bytes of images and videos, wherever a request says they are: http(s) and data: URLs, and files where that is allowed.

Whoever sends a request chooses the source, so every source is hostile: `MediaPolicy` says what may be asked and what it may
cost. Knows nothing of what the bytes mean. Runs on trio, in the parent.
"""

from collections.abc import Sequence

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


async def fetch(source: str, policy: MediaPolicy, *, index: int = 0, network: Network = _INTERNET) -> bytes:
    """The bytes of one medium, at least one.

    Args:
        source: an http:, https: or data: URL, or a file: URL or absolute path under `policy.allowed_path`.
        index: the medium's place among the request's, for the error.
        network: what to resolve and connect with.

    Raises:
        MediaError: refused by the policy, not had, empty, larger than `policy.max_bytes`, or not there in `policy.timeout`
            seconds.
    """
    try:
        with trio.move_on_after(policy.timeout) as scope:
            content = await _fetch(source.strip(), policy, network)
        if scope.cancelled_caught:
            raise MediaError(f"fetching it took longer than {policy.timeout:g} seconds")
        if not content:
            raise MediaError("it is empty")
    except MediaError as error:
        raise MediaError(error.reason, index=index) from error
    return content


async def fetch_all(sources: Sequence[str], policy: MediaPolicy, *, network: Network = _INTERNET) -> list[bytes]:
    """The bytes of a request's media in order, up to `policy.concurrency` fetched at the same time.

    Raises:
        MediaError: of the first that fails; the others are cancelled.
    """
    contents = [b""] * len(sources)
    failure: MediaError | None = None
    places = trio.CapacityLimiter(policy.concurrency)

    async def fetch_one(index: int) -> None:
        nonlocal failure
        try:
            async with places:
                contents[index] = await fetch(sources[index], policy, index=index, network=network)
        except MediaError as error:
            failure = failure or error
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for index in range(len(sources)):
            nursery.start_soon(fetch_one, index)
    if failure is not None:
        raise failure
    return contents


async def _fetch(source: str, policy: MediaPolicy, network: Network) -> bytes:
    scheme = source[:8].partition(":")[0].lower()
    if scheme in ("http", "https"):
        return await _fetch_http(source, policy, network)
    # In a thread, which a deadline leaves behind: large texts take long, and a file may lie on a disk that does not answer.
    if scheme == "data":
        return await trio.to_thread.run_sync(decode_data_uri, source, policy.max_bytes, abandon_on_cancel=True)
    if scheme == "file" or source.startswith("/"):
        return await trio.to_thread.run_sync(read_file, source, policy.allowed_path, policy.max_bytes, abandon_on_cancel=True)
    raise MediaError("it is none of an http:, https:, data: and file: URL")


async def _fetch_http(source: str, policy: MediaPolicy, network: Network) -> bytes:
    url = parse_url(source)
    for _ in range(MAX_REDIRECTS + 1):
        answer = await get(url, policy, network)
        if isinstance(answer, bytes):
            return answer
        target = resolve_location(url, answer.location)
        if (url.scheme, target.scheme) == ("https", "http"):
            raise MediaError("it is redirected from https to http")
        url = target
    raise MediaError(f"it is redirected more than {MAX_REDIRECTS} times")
