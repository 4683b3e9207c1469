"""Plugins of all tests."""

pytest_plugins = ["tests.features.plugin", "pytester"]
