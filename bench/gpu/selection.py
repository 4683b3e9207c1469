"""A pytest plugin: of all tests, those that run a kernel on the GPU where there is one."""

import pytest

FIXTURES = {"triton_path"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen, others = [], []
    for item in items:
        (chosen if runs_on_gpu(item) else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def runs_on_gpu(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None or not FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))
