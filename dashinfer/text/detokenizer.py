"""`IncrementalDetokenizer`: the token ids of one choice to text that is safe to show now.

Owns what is held back: bytes of an unfinished character, and text that may turn out to be the begin of a stop string. Knows
nothing of why a sequence ends. One object belongs to one choice and one thread at a time. A push costs the length of its own
tokens, whatever came before.

Which stop string counts does not depend on how tokens were grouped: it is the first one that is complete, reading character
by character, and the longest of those that end at the same character.
"""

import codecs
from collections.abc import Sequence

from dashinfer.text.tokenizer import Tokenizer


class _Matcher:
    """Follows one stop string through a text (Knuth, Morris, Pratt 1977). `state`: characters of it that match just now."""

    def __init__(self, stop: str) -> None:
        assert stop
        self.stop = stop
        self.state = 0
        self._fallback = [0] * len(stop)
        length = 0
        for i in range(1, len(stop)):
            while length and stop[i] != stop[length]:
                length = self._fallback[length - 1]
            length += stop[i] == stop[length]
            self._fallback[i] = length

    def advance(self, character: str) -> bool:
        """Whether the stop string ends with this character. Not to be called again after that."""
        while self.state and character != self.stop[self.state]:
            self.state = self._fallback[self.state - 1]
        self.state += character == self.stop[self.state]
        return self.state == len(self.stop)


class IncrementalDetokenizer:
    """Attributes: stopped: the stop string that was found, or None."""

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), skip_special_tokens: bool = True, continues: bool = False
    ) -> None:
        """`continues`: the text goes on from an open message (`continue_final_message`), so a leading space belongs to it."""
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.drops_first_space and not continues
        self._matchers = [_Matcher(text) for text in stop]
        self._held = ""  # decoded, and perhaps the begin of a stop string

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that can be shown now; "" once a stop string was found.

        Not to be given the token that ended the sequence: it is no part of the text.
        """
        if self.stopped is not None:
            return ""
        token_bytes = self._tokenizer.token_bytes
        raw = b"".join([token_bytes(token) for token in token_ids if token not in self._skipped])
        return self._show(self._utf8.decode(raw))

    def finish(self) -> str:
        """What was held back, when no more tokens come; "" after a stop string. An unfinished character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        shown = self._show(self._utf8.decode(b"", True)) + self._held
        self._held = ""
        return shown

    def _show(self, text: str) -> str:
        if self._drop_space and text:
            text = text.removeprefix(" ")
            self._drop_space = False
        if not self._matchers or not text:
            return text
        known = len(self._held)
        text = self._held + text
        for end in range(known, len(text)):
            character = text[end]
            ended = [matcher.stop for matcher in self._matchers if matcher.advance(character)]
            if ended:
                self.stopped = max(ended, key=len)
                self._held = ""
                return text[: end + 1 - len(self.stopped)]
        safe = len(text) - max(matcher.state for matcher in self._matchers)
        self._held = text[safe:]
        return text[:safe]
