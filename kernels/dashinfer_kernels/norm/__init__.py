"""Root-mean-square and layer normalisation, alone or after adding to the residual stream."""
