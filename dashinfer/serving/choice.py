"""One choice of a chat completion: its tokens to content, thinking and calls, and to what is counted of them.

Counting: `completion_tokens` are the tokens the model produced, the one that ended the choice included (as OpenAI counts), up
to and including the token that completed a stop string. `reasoning_tokens` are those of them up to and including the end of
the thinking. Log-probabilities are given for tokens of the text, thinking and calls included, so not for an end token and not
for the token that completed a stop string. Stop strings count anywhere in the text.
"""

from collections.abc import Callable, Sequence
from typing import Any

from dashinfer.engine.api import TokenOutput
from dashinfer.protocol import stream
from dashinfer.protocol.chat import ChatCompletionRequest, ChoiceFinish
from dashinfer.serving.answers import AnswerPlan
from dashinfer.serving.service import TextModel
from dashinfer.text.detokenizer import IncrementalDetokenizer, StopString
from dashinfer.text.tools.events import Arguments, CallBegin, Content, Event, Reasoning, merged
from dashinfer.types import FinishReason


class Message:
    """What a whole answer is put together from."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []

    def add(self, event: Event, new_id: Callable[[], str]) -> None:
        match event:
            case Content(text):
                self._content.append(text)
            case Reasoning(text):
                self._reasoning.append(text)
            case CallBegin(_, name):
                self._calls.append((new_id(), name, []))
            case Arguments(index, text):
                self._calls[index][2].append(text)

    def choice(self, index: int, reason: ChoiceFinish, logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
        calls = [stream.tool_call(id, name, "".join(arguments)) for id, name, arguments in self._calls]
        reasoning = "".join(self._reasoning)
        return stream.choice(index, "".join(self._content), reason, logprobs, reasoning=reasoning, tool_calls=calls)


class Choice:
    """One choice's way from tokens to content, thinking and calls.

    Attributes:
        tokens: that it has.
        reasoning_tokens: those of the thinking.
        finish: why it ended, or None.
        stopped: it was ended here, so that the engine does not know yet.
    """

    def __init__(
        self, index: int, request: ChatCompletionRequest, answer: AnswerPlan, stop: list[StopString], text: TextModel
    ) -> None:
        """`answer`: what is to be found in the output."""
        self.index = index
        self.tokens = 0
        self.finish: ChoiceFinish | None = None
        self.stopped = False
        self._text = text
        self._parser = answer.parser()
        self._thinking_tokens = 0
        self._one_by_one = bool(request.stop) or answer.one_call
        self._logprobs = request.logprobs
        self._entries: list[dict[str, Any]] = []
        self._detokenizer = IncrementalDetokenizer(
            text.tokenizer,
            stop=stop,
            skip_special_tokens=request.skip_special_tokens,
            shown_tokens=answer.shown_tokens,
            continues=request.continue_final_message,
        )

    def push(self, outputs: Sequence[TokenOutput]) -> list[Event]:
        """What can be shown now. Sets `finish` once the choice has ended, by the engine, a stop string or the only call."""
        last = outputs[-1]
        shown = [output for output in outputs if output.finish != "stop"]
        events: list[Event] = []
        start = 0
        while start < len(shown):
            thinking = self._parser is not None and self._parser.thinking
            # One by one, so that what is counted ends where the text does, however many tokens came at once.
            group = shown[start : start + 1] if self._one_by_one or thinking else shown[start:]
            start += len(group)
            self.tokens += len(group)
            self._thinking_tokens += thinking
            events += self._parse(self._detokenizer.push([output.token for output in group]))
            if self._detokenizer.stopped is not None:
                self.stopped = True
                return self._ended("stop", events)
            if self._logprobs:
                for output in group:
                    self._add_logprobs(output)
            if self._parser is not None and self._parser.full:
                self.stopped = last.finish is None or start < len(shown)
                return self._ended("stop", events)
        if last.finish is not None:
            self.tokens += last.finish == "stop"
            events += self._parse(self._detokenizer.finish())
            return self._ended(last.finish, events)
        return merged(events)

    def _parse(self, text: str) -> list[Event]:
        if self._parser is None:
            return [Content(text)] if text else []
        return self._parser.push(text)

    def _ended(self, reason: FinishReason, events: list[Event]) -> list[Event]:
        """With what was held back. Calls are the reason of an answer's end where it is not cut off."""
        self.finish = reason
        if self._parser is not None:
            events += self._parser.finish()
            if self._parser.calls and reason == "stop":
                self.finish = "tool_calls"
        return merged(events)

    @property
    def stop_string(self) -> str | None:
        return self._detokenizer.stopped

    @property
    def reasoning_tokens(self) -> int:
        return self._thinking_tokens if self._parser is not None and self._parser.thought else 0

    def new_call_id(self) -> str:
        assert self._text.tools is not None, "there are calls where they can be read"
        return self._text.tools.new_id()

    def take_logprobs(self) -> list[dict[str, Any]] | None:
        """The entries since the last call; None where none were asked for."""
        if not self._logprobs:
            return None
        entries, self._entries = self._entries, []
        return entries

    def _add_logprobs(self, output: TokenOutput) -> None:
        if self._logprobs:
            assert output.logprobs is not None, "asked for and not delivered"
            self._entries.append(stream.logprob_entry(output.token, output.logprobs, self._text.tokenizer.token_text))


def by_choice(outputs: list[TokenOutput]) -> dict[int, list[TokenOutput]]:
    """Outputs by the index of their choice, in order."""
    if len(outputs) == 1:
        return {outputs[0].index: outputs}
    grouped: dict[int, list[TokenOutput]] = {}
    for output in outputs:
        grouped.setdefault(output.index, []).append(output)
    return grouped
