"""Bidirectional attention within sequences of unequal length, not paged: what vision towers need, whole images or windows."""
