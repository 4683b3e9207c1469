"""Fixtures of tests with processes."""

from collections.abc import Callable

import pytest

from .ranks import all_children


@pytest.fixture
def children() -> Callable[[], list[int]]:
    """Process ids of the living children that this process got since the test began."""
    before = set(all_children())
    return lambda: [pid for pid in all_children() if pid not in before]
