"""Drives any server that speaks OpenAI's chat API, and measures what its clients see.

    target < stats, client, prompts < measure < report, plot

Knows servers by their URL alone, so that peers are measured by the same code in the same run; imports nothing of the server.
"""
