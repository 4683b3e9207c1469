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


class StopString:
    """A stop string and the table that finds it in a text (Knuth, Morris, Pratt 1977). It does not change, so that the choices
    of a request share one."""

    def __init__(self, text: str) -> None:
        """Takes time in proportion to the text's length."""
        assert text
        self.text = text
        # For each length of a match: the longest shorter one that ends at the same character.
        self._fallback = [0] * len(text)
        length = 0
        for i in range(1, len(text)):
            length = self.advance(length, text[i])
            self._fallback[i] = length

    def advance(self, length: int, character: str) -> int:
        """How many of its characters match after `character`, when `length`, which is not all of them, matched before."""
        while length and character != self.text[length]:
            length = self._fallback[length - 1]
        return length + (character == self.text[length])


class IncrementalDetokenizer:
    """Attributes: stopped: the stop string that was found, or None."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[StopString] = (),
        skip_special_tokens: bool = True,
        shown_tokens: frozenset[int] = frozenset(),
        continues: bool = False,
    ) -> None:
        """
        Args:
            shown_tokens: special tokens that are never skipped: markers that somebody wants to find in the text.
            continues: the text goes on from an open message (`continue_final_message`), so a leading space belongs to it.
        """
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - shown_tokens if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.drops_first_space and not continues
        self._stop = stop
        self._matched = [0] * len(stop)  # characters of each stop string that match just now
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
        if not self._stop or not text:
            return text
        known = len(self._held)
        text = self._held + text
        for end in range(known, len(text)):
            character = text[end]
            ended = []
            for i, stop in enumerate(self._stop):
                self._matched[i] = stop.advance(self._matched[i], character)
                if self._matched[i] == len(stop.text):
                    ended.append(stop.text)
            if ended:
                self.stopped = max(ended, key=len)
                self._held = ""
                return text[: end + 1 - len(self.stopped)]
        safe = len(text) - max(self._matched)
        self._held = text[safe:]
        return text[:safe]
