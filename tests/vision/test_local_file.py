"""Files under one directory: those in it, and every way out of it."""

import contextlib
import os
from pathlib import Path

import pytest

from dashinfer.errors import MediaError
from dashinfer.vision.fetch import fetch
from dashinfer.vision.local_file import _open_beneath, read_file
from dashinfer.vision.policy import MediaPolicy

pytestmark = pytest.mark.feature("Vision", "Images")

PICTURE = bytes(range(256)) * 8


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A directory to allow, itself reached through a link, with a picture inside and a secret beside it."""
    inside = tmp_path / "true"
    (inside / "sub dir").mkdir(parents=True)
    (inside / "sub dir" / "\u00e9#1.png").write_bytes(PICTURE)
    (inside / "large.png").write_bytes(bytes(4096 + 1))
    (inside / "within.png").symlink_to(inside / "sub dir" / "\u00e9#1.png")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "true-beside").mkdir()
    (tmp_path / "true-beside" / "secret.png").write_bytes(b"secret")
    (inside / "out.png").symlink_to(tmp_path / "secret.png")
    (inside / "out").symlink_to(tmp_path)
    (inside / "circle").symlink_to(inside / "circle")
    os.mkfifo(inside / "pipe")
    (tmp_path / "media").symlink_to(inside)
    return tmp_path / "media"


async def test_a_file_is_a_source(media: Path) -> None:
    policy = MediaPolicy(allowed_path=media)

    assert await fetch(f"file://{media}/within.png", policy) == PICTURE
    assert await fetch(f"{media}/within.png", policy) == PICTURE


def test_files(media: Path) -> None:
    for path in (media, media.resolve()):
        quoted = f"{path}/sub%20dir/%C3%A9%231.png"
        for source in (
            "file://" + quoted,
            "FILE://localhost" + quoted,
            "file:" + quoted,
            f"{path}/sub dir/\u00e9#1.png",
            f"{path}/./sub dir//\u00e9#1.png",
            f"file://{path}/within.png",
        ):
            assert read_file(source, media, len(PICTURE)) == PICTURE


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/absent",
        "{}",
        "{}/absent.png",
        "{}/sub dir",
        "{}/../secret.png",
        "{}/sub dir/../within.png",
        "{}/out.png",
        "{}/out/secret.png",
        "{}/circle",
        "{}/pipe",
        "{}/within.png/x",
        "{}-beside/secret.png",
        "/dev/zero",
        "/dev/fd/0",
        "/proc/self/environ",
        "{}/a\0b",
        "{}/\ud800",
        "{}/" + "a" * 5000,
        "/9j/4AAQSkZJRgABAQ",
    ],
)
@pytest.mark.parametrize("form", ["plain", "URL", "quoted"])
def test_files_that_are_refused_all_with_the_same_words(media: Path, path: str, form: str) -> None:
    path = path.format(media.resolve())
    if form != "plain":
        path = "file://" + path.replace(" ", "%20").replace("..", "%2e%2E" if form == "quoted" else "..").replace("\0", "%00")

    with pytest.raises(MediaError) as caught:
        read_file(path, media, 4096)

    assert caught.value.reason == "it is not a readable file under this server's --allowed-media-path"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("file://{}/large.png", "larger than 4096 bytes"),
        ("file://host{}/within.png", "malformed"),
        ("file://{}/within.png?x", "malformed"),
        ("file://{}/within.png#x", "malformed"),
        ("file:within.png", "malformed"),
    ],
)
def test_files_that_are_refused(media: Path, source: str, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        read_file(source.format(media), media, 4096)


async def test_no_files_by_default(media: Path) -> None:
    for source in (f"file://{media}/within.png", f"{media}/within.png", "file:///absent", "file:x"):
        with pytest.raises(MediaError, match="reads no files"):
            await fetch(source, MediaPolicy())


def test_a_link_put_there_after_the_check(media: Path) -> None:
    for parts in (("out", "secret.png"), ("out.png",), ("within.png",)):
        with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
            _open_beneath(media.resolve(), parts)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs a /proc that lists open files")
def test_no_descriptor_is_left_open(media: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))

    for name in ("within.png", "sub dir", "sub dir/absent", "pipe", "absent", "out.png", "large.png", "within.png/x"):
        with contextlib.suppress(MediaError):
            read_file(f"{media}/{name}", media, 4096)

    assert sorted(os.listdir("/proc/self/fd")) == before
