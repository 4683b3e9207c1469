"""Decoders: from a config and weight files to hidden states and logits. Runs in the worker; knows nothing of requests."""
