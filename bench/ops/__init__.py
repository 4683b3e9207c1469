"""Benches of the ops, a file an op: `jobs` names what is measured, and builds inputs when their turn has come."""
