"""Fixtures of tests of media."""

from collections.abc import AsyncIterator

import pytest
import trio

from tests.vision.fake_internet import FakeInternet


@pytest.fixture
async def internet(nursery: trio.Nursery) -> AsyncIterator[FakeInternet]:
    internet = FakeInternet(nursery)
    yield internet
    assert internet.open_lines == set()
