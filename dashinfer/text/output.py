"""`OutputParser`: the text of one output to thinking, answer and calls."""

from dashinfer.text.reasoning import ReasoningSplitter
from dashinfer.text.tools.events import Content, Event, Reasoning, merged
from dashinfer.text.tools.parser import ToolParser


class OutputParser:
    """Without a splitter, nothing is thinking; without a parser of calls, nothing is a call."""

    def __init__(self, reasoning: ReasoningSplitter | None, tools: ToolParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def thinking(self) -> bool:
        """The answer has not begun."""
        return self._reasoning is not None and self._reasoning.thinking

    @property
    def thought(self) -> bool:
        """There is thinking in the output."""
        return self._reasoning is not None and self._reasoning.began

    @property
    def calls(self) -> int:
        """How many calls were begun."""
        return 0 if self._tools is None else self._tools.calls

    @property
    def full(self) -> bool:
        """Every call that is wanted is there."""
        return self._tools is not None and self._tools.full

    def push(self, text: str) -> list[Event]:
        """What is certain now."""
        if self._reasoning is None:
            return self._answer(text)
        thought, answer = self._reasoning.push(text)
        return merged([Reasoning(thought), *self._answer(answer)])

    def finish(self) -> list[Event]:
        """The rest, when no more text comes."""
        events: list[Event] = []
        if self._reasoning is not None:
            thought, answer = self._reasoning.finish()
            events = [Reasoning(thought), *self._answer(answer)]
        if self._tools is not None:
            events += self._tools.finish()
        return merged(events)

    def _answer(self, text: str) -> list[Event]:
        if not text:
            return []
        return [Content(text)] if self._tools is None else self._tools.push(text)
