"""Drives any server that speaks OpenAI's chat API, and measures what its clients see; README.md beside this file says how.

    target < stats, client, prompts < load, memory, servers < report, plot < __main__, conftest

Knows servers by their URL alone, so that peers are measured by the same code in the same run; imports nothing of `dashinfer`.
"""
