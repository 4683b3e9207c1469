"""Launch parameters, measured on the GPU at hand."""
