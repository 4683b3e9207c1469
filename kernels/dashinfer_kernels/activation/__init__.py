"""Gated activations of a feed-forward layer."""
