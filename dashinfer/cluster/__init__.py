"""Ranks on other machines: machine 0 has a `Hub`, which the `Agent` of each other machine dials and starts ranks for.

Every connection is authenticated by a shared secret, and every frame on it carries a MAC. Runs in parent processes alone.
"""
