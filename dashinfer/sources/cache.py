"""The user's cache directory, and writing to it so that no process ever sees half of an entry.

Entries are made under a temporary name beside their final one and renamed: two processes that make the same entry at once both
succeed, and the later one wins or is thrown away. Knows nothing of what is kept.
"""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dashinfer.errors import ConfigurationError


def cache_directory() -> Path:
    """`$DASHINFER_CACHE`, or `dashinfer` under `$XDG_CACHE_HOME` or `~/.cache`. It need not exist."""
    if own := os.environ.get("DASHINFER_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)).absolute() / "dashinfer"


# What only writing can fail with.
WRITE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
_ABANDONED = 24 * 3600.0  # seconds


def _remove_abandoned(target: Path) -> None:
    """Delete what a process that was killed has left of the same entry: it may be large."""
    for left in target.parent.glob(f".{target.name}.*"):
        if time.time() - left.stat().st_mtime > _ABANDONED:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def new_entry(target: Path) -> Iterator[Path]:
    """An empty temporary directory that becomes `target` at the end of the block, or vanishes if the block fails.

    An entry that another process finished in the meantime stays, and ours is thrown away.

    Raises:
        ConfigurationError: the cache cannot be written to, or the disk is full. Other errors of the block go through.
    """
    temporary = None
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(target)
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        except OSError as error:
            raise _not_written(target, error) from error
        try:
            yield temporary
        except OSError as error:
            if error.errno in WRITE_ERRORS:  # any other may be of what the entry is made from
                raise _not_written(target, error) from error
            raise
        try:
            temporary.rename(target)
        except OSError as error:
            if not target.is_dir():
                raise _not_written(target, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _not_written(target: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"cannot write to the cache directory {target.parent}: {error.strerror or error}; "
        "DASHINFER_CACHE can name another directory"
    )
