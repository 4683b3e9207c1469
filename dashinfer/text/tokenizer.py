"""`Tokenizer`: text to token ids and back. Objects are immutable after construction and safe to share between threads."""

from collections.abc import Sequence

from dashinfer.sources import ModelSource


class Tokenizer:
    """Text to ids and back.

    Attributes:
        vocab_size: one more than the greatest token id (the model may pad its logits further).
        eos_token_ids: every id that ends a turn, sorted.
        special_ids: ids that `skip_special_tokens` leaves out.
        special_tokens: `bos_token`, `eos_token`, ... as text, for the chat template.
    """

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    special_ids: frozenset[int]
    special_tokens: dict[str, str]

    @classmethod
    def from_source(cls, source: ModelSource) -> "Tokenizer":
        """Raises: UnsupportedModel where the tokeniser's file cannot be used."""
        raise NotImplementedError

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; special tokens written in it become their ids. Releases the GIL: run long texts in a thread."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        raise NotImplementedError

    def token_text(self, token: int) -> tuple[str, list[int]]:
        """One token as OpenAI's logprobs show it: its text (U+FFFD for half a character) and its bytes."""
        raise NotImplementedError
