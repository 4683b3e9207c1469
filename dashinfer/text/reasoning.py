"""What a model thinks before it answers: how it is marked in the text, and `ReasoningSplitter`, which takes the two apart.

White space around the thinking belongs to the markers and is dropped. Knows nothing of tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dashinfer.config import ReasoningParserName

_BLANK = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Attributes:
    opens, closes: the markers.
    always: an output begins with thinking even where no marker opens it.
    """

    opens: str
    closes: str
    always: bool = False

    def begins_inside(self, prompt: str) -> bool:
        """Whether an output is thinking from its first token on, after a prompt that ends with the begin of an answer."""
        end = prompt.rstrip(_BLANK)
        return end.endswith(self.opens) or (self.always and not end.endswith(self.closes))


REASONING_FORMATS = {
    "qwen3": ReasoningFormat("<think>", "</think>"),
    "deepseek_r1": ReasoningFormat("<think>", "</think>", always=True),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
}


def reasoning_format(
    name: ReasoningParserName, template: str | None, token_id: Callable[[str], int | None]
) -> ReasoningFormat | None:
    """The format of a name; for `auto`, what the model's template writes or its vocabulary has a token for.

    Args:
        token_id: of a text that is a single token, `Tokenizer.marker_id`.
    """
    if name != "auto":
        return REASONING_FORMATS.get(name)
    for key in ("qwen3", "mistral"):
        found = REASONING_FORMATS[key]
        if found.closes in (template or "") or (token_id(found.opens) is not None and token_id(found.closes) is not None):
            return found
    return None


class ReasoningSplitter:
    """One output's.

    Attributes:
        thinking: neither the answer nor, where no thinking has to come, the first word of it has begun.
        began: there is thinking in it, if perhaps no word of it.
    """

    def __init__(self, format: ReasoningFormat, *, inside: bool) -> None:
        self.thinking = True
        self._format = format
        self._inside = inside
        self._held = ""
        self._run = self._opening

    @property
    def began(self) -> bool:
        return self._inside

    def push(self, text: str) -> tuple[str, str]:
        """More thinking and more of the answer, as far as they are certain."""
        self._held += text
        return self._run()

    def finish(self) -> tuple[str, str]:
        """The rest, when no more text comes."""
        held, self._held = self._held, ""
        if self._run == self._opening and not self._inside:
            return "", held
        if self.thinking:
            return held.rstrip(_BLANK), ""
        return "", held

    def _opening(self) -> tuple[str, str]:
        begin = self._held.lstrip(_BLANK)
        if begin.startswith(self._format.opens):
            self._held = begin.removeprefix(self._format.opens)
            self._inside = True
        elif self._format.opens.startswith(begin):
            return "", ""
        elif not self._inside:
            self.thinking = False
            self._run = self._answer
            return self._answer()
        self._run = self._first_thought
        return self._first_thought()

    def _first_thought(self) -> tuple[str, str]:
        self._held = self._held.lstrip(_BLANK)
        if not self._held:
            return "", ""
        self._run = self._thought
        return self._thought()

    def _thought(self) -> tuple[str, str]:
        thought, closed, rest = self._held.partition(self._format.closes)
        if closed:
            self._held = rest
            self.thinking = False
            self._run = self._first_answer
            return thought.rstrip(_BLANK), self._first_answer()[1]
        for size in range(min(len(self._format.closes) - 1, len(thought)), 0, -1):
            if thought.endswith(self._format.closes[:size]):
                break
        else:
            size = 0
        shown = thought[: len(thought) - size].rstrip(_BLANK)
        self._held = thought[len(shown) :]
        return shown, ""

    def _first_answer(self) -> tuple[str, str]:
        self._held = self._held.lstrip("\n")
        if not self._held:
            return "", ""
        self._run = self._answer
        return self._answer()

    def _answer(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        return "", held
