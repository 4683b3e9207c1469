"""Rotary embedding of heads in place, by angles of each token's own."""
