"""What quantisation costs: a text's perplexity, and next-token distributions beside those of the unquantised model."""
