"""A pytest plugin: of all tests, those that run a kernel on the GPU where there is one."""

import pytest

FIXTURES = {"triton_path"}
# Parameters with which a test asks for the fixture when it runs.
PATHS = (("path", "triton"), ("path", "triton_path"), ("triton", True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen, others = [], []
    for item in items:
        (chosen if runs_on_gpu(item) else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def runs_on_gpu(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return (
        item.get_closest_marker("gpu") is not None
        or not FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))
        or any(parameters.get(name) == value for name, value in PATHS)
    )
