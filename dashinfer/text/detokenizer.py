"""`IncrementalDetokenizer`: token ids of one choice to text that is safe to show now. One object a choice, one thread at a time."""

from collections.abc import Sequence

from dashinfer.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Attributes: stopped: the stop string that was found, or None."""

    stopped: str | None

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), skip_special_tokens: bool = True, continues: bool = False
    ) -> None:
        """`continues`: the text goes on from an open message (`continue_final_message`), so a leading space belongs to it."""
        raise NotImplementedError

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that can be shown now; "" once a stop string was found. Not to be given the token that ended the sequence."""
        raise NotImplementedError

    def finish(self) -> str:
        """What was held back, when no more tokens come; "" after a stop string."""
        raise NotImplementedError
