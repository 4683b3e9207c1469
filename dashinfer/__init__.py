"""DashInfer: an OpenAI-compatible server for language and vision-language models."""

__version__ = "3.0.0.dev0"
