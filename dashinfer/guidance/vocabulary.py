"""A tokenizer as llguidance sees it: each token's bytes, in a tree. Built once for a model; takes a second for a large one."""

from typing import TYPE_CHECKING

from dashinfer.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer


# What forced text looks like: a tokenizer may put a space before each.
_SAMPLES = ("{", '"', " a", "1", "é", "\n")


def make_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> "LLTokenizer":
    """For masks of `vocab_size` bits: ids beyond the tokenizer's are allowed nowhere, and its own beyond that are left out.

    Raises:
        ValueError: no token ends a turn.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = [token for token in tokenizer.eos_token_ids if 0 <= token < vocab_size]
    if not ends:
        raise ValueError("the model has no token that ends an answer")
    if tokenizer.vocab_size <= vocab_size:
        try:
            found = LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=ends)
        except ValueError:  # a kind of tokenizer that the library cannot read
            pass
        else:
            if _agree(found, tokenizer):
                return found
    return LLTokenizer(TokenizerWrapper(Words(tokenizer, vocab_size, ends[0])), n_vocab=vocab_size, eos_token=ends)


def _agree(found: "LLTokenizer", tokenizer: Tokenizer) -> bool:
    """Whether the library reads the tokenizer as we do, and gives back the texts that it is given."""
    return all(found.decode_bytes(found.tokenize_str(text)) == text.encode() for text in _SAMPLES) and all(
        found.decode_bytes([token]) == tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)
    )


class Words:
    """Our own reading of the tokens. Slower: the library calls back for every text that it wants as tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end: int) -> None:
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = [token for token in tokenizer.special_ids if token < vocab_size]
        self.eos_token_id = end
        self.bos_token_id = None
        self._tokenizer = tokenizer
        ordinary = {word: token for token, word in enumerate(self.tokens) if token not in tokenizer.special_ids}
        self._ids = {word: token for word, token in ordinary.items() if word}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of exactly this text, as the tokenizer cuts it after a line's end if that is possible."""
        raw = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.encode("\n" + raw.decode("utf-8", "replace"))
        for count in range(1, len(ids)):
            if self._bytes(ids[:count]).lstrip(b" ") == b"\n" and self._bytes(ids[count:]) == raw:
                return ids[count:]
        return self._greedy(raw)

    def _bytes(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[token] if token < len(self.tokens) else b"" for token in ids)

    def _greedy(self, raw: bytes) -> list[int]:
        """The longest token first. Bytes that no token begins with are left out."""
        found, start = [], 0
        while start < len(raw):
            for end in range(min(len(raw), start + self._longest), start, -1):
                if (token := self._ids.get(raw[start:end])) is not None:
                    found.append(token)
                    break
            else:
                end = start + 1
            start = end
        return found
