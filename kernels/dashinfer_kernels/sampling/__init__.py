"""From logits to tokens, one row a sequence."""
