"""All layers of a decoder for the next token of a few sequences, on CPU, as one op."""
