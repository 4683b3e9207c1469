"""A long English text that every Python installation has: the documentation behind `help()`."""

import pydoc_data.topics

import torch
from tokenizers import Tokenizer
from torch import Tensor


def read_text() -> str:
    """About 600,000 characters, the same for one version of Python."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def windows(tokens: list[int], *, count: int, length: int) -> Tensor:
    """The first `count` tokens or more, cut into rows: [windows, length] int64.

    Raises:
        ValueError: there are not as many.
    """
    rows = -(-count // length)
    if len(tokens) < rows * length:
        raise ValueError(f"the text has {len(tokens)} tokens; {rows * length} are needed")
    return torch.tensor(tokens[: rows * length]).view(rows, length)


def text_windows(tokenizer: Tokenizer, *, count: int, length: int) -> Tensor:
    """The text's first tokens as `windows`."""
    # a token has at least a character; 12 of them are more than enough to look at for each
    return windows(tokenizer.encode(read_text()[: 12 * count], add_special_tokens=False).ids, count=count, length=length)


def byte_windows(*, count: int, length: int) -> Tensor:
    """As `text_windows` for models without a tokeniser: each byte of the text in UTF-8 is a token."""
    return windows(list(read_text().encode()[: 2 * count]), count=count, length=length)
