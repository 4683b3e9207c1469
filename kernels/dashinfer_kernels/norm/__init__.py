"""Root-mean-square normalisation, alone or after adding to the residual stream."""
