"""Activations to 8 bits, each row with a scale of its own."""
