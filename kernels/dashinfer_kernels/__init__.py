"""Ops of the engine. Each folder is one op: `reference.py` defines it, `launch.py` dispatches it by device."""
