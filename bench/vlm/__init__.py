"""Servers of vision-language models side by side: `bench.serve`'s command with a picture in each request."""
