"""Hermes' and Qwen's calls: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number, between other text."""

from dashinfer.text.tools.parser import Reading, ToolParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(ToolParser):
    def _parse(self) -> Reading[None]:
        while (yield from self._content(OPEN)):
            self._keep()
            self._at += len(OPEN)
            yield from self._blank()
            outcome = yield from self._json_call(known=False)
            if outcome is None:
                self._give_back(len(OPEN))
            elif outcome:
                self._end()
                yield from self._blank()
                yield from self._literal(CLOSE)
