"""`data:` URIs: what they hold, and what is refused."""

import base64
import os
import re

import pytest

from dashinfer.errors import MediaError
from dashinfer.vision.fetch import fetch
from dashinfer.vision.policy import MediaPolicy

pytestmark = pytest.mark.feature("Vision", "Images")

PICTURE = bytes(range(256)) * 8


@pytest.mark.parametrize(
    ("uri", "content"),
    [
        ("data:image/png;base64," + base64.b64encode(PICTURE).decode(), PICTURE),
        ("DATA:;charset=x; BASE64 ,QUJD", b"ABC"),
        ("data:image/png;base64,QUI=", b"AB"),
        ("data:image/png;base64,QUI", b"AB"),
        ("data:image/png;base64,QQ%3D%3D", b"A"),
        ("data:image/png;base64,QU\nJD\r\n RA==\n", b"ABCD"),
        ("data:image/png,%00a%ff+,", b"\x00a\xff+,"),
        ("data:,a", b"a"),
        ("data:base64,QQ==", b"QQ=="),
    ],
)
async def test_data_uris(uri: str, content: bytes) -> None:
    assert await fetch(uri, MediaPolicy(max_bytes=4096)) == content


@pytest.mark.parametrize("size", [256 * 1024 * 3 // 4 + delta for delta in (-2, -1, 0, 1, 2)])
async def test_a_large_data_uri(size: int) -> None:
    content = os.urandom(size)
    text = base64.b64encode(content).decode()

    assert await fetch("data:;base64," + text, MediaPolicy(max_bytes=size)) == content
    assert await fetch("data:;base64," + re.sub("(.{77})", r"\1\n", text), MediaPolicy(max_bytes=size)) == content
    with pytest.raises(MediaError, match="larger than"):
        await fetch("data:;base64," + text, MediaPolicy(max_bytes=size - 1))


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:" + "x" * 2000 + ",a", "no comma"),
        ("data:image/png;base64,", "is empty"),
        ("data:,", "is empty"),
        ("data:;base64,QUJ$", "not valid base64"),
        ("data:;base64,QUJD\u00e9", "not ASCII"),
        ("data:,\ud800", "not ASCII"),
        ("data:;base64,QUJD%C3%A9", "not valid base64"),
        ("data:;base64,A", "not valid base64"),
        ("data:;base64,QQ===", "not valid base64"),
        ("data:;base64,QQ==QQ==", "not valid base64"),
        ("data:;base64," + "QUJD" * 65535 + "QQ==" + "QUJD", "not valid base64|larger"),
        ("data:;base64,QUJD_-", "not valid base64"),
        ("data:;base64," + "A" * 5464, "larger than 4096 bytes"),
        ("data:," + "A" * 4097, "larger than 4096 bytes"),
        ("data:," + "%41" * 4097, "larger than 4096 bytes"),
    ],
)
async def test_data_uris_that_are_refused(uri: str, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        await fetch(uri, MediaPolicy(max_bytes=4096))
