"""What a GPU run measures, and how it is reported."""
