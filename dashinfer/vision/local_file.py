"""Files under one allowed directory, and no other: whatever else a path names is refused with the same words, there or not."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote_to_bytes

from dashinfer.errors import MediaError

_FILE_URL = re.compile(r"file:(?://(?:localhost)?)?(/(?!/)[^?#]*)", re.IGNORECASE)


def read_file(source: str, allowed: Path | None, max_bytes: int) -> bytes:
    """The content of a regular file that `source`, an absolute path or a `file:` URL, names under the directory `allowed`.

    Symbolic links may lead to other places under `allowed`. Blocks while it reads.

    Raises:
        MediaError: no directory is allowed, no such file lies there, or it has more than `max_bytes` bytes.
    """
    if allowed is None:
        raise MediaError("this server reads no files; it has no --allowed-media-path")
    match = _FILE_URL.fullmatch(source)
    if match is None and not source.startswith("/"):
        raise MediaError("its file: URL is malformed; write file:///absolute/path")
    refusal = MediaError("it is not a readable file under this server's --allowed-media-path")
    try:
        path = os.fsdecode(unquote_to_bytes(match[1])) if match else source
        if ".." in path.split("/"):
            raise refusal
        root = allowed.resolve()
        descriptor = _open_beneath(root, Path(path).resolve().relative_to(root).parts)
    except (OSError, ValueError, RuntimeError):  # ValueError: outside, or no path at all; RuntimeError: links in a circle
        raise refusal from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise refusal
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(max_bytes + 1)
    except OSError:
        raise refusal from None
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:
        raise MediaError(f"it is larger than {max_bytes} bytes")
    return content


def _open_beneath(root: Path, parts: Sequence[str]) -> int:
    """A descriptor of root/parts, opened part by part without following links: one put there since the check is refused."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for part in parts:
        # O_NONBLOCK: opening a pipe would wait for its writer
        above, flags = descriptor, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(part, flags, dir_fd=above)
        finally:
            os.close(above)
    return descriptor
