"""Llama 3's calls as JSON: `{"name": ..., "parameters": {...}}` instead of an answer, several with `;` between them, or the
same after `<|python_tag|>` anywhere.

Without the tag, only functions that the request has make a call: any other object is an answer in JSON.
"""

from dashinfer.text.tools.parser import Reading, ToolParser

TAG = "<|python_tag|>"


class LlamaParser(ToolParser):
    def _parse(self) -> Reading[None]:
        while True:
            self._keep()
            yield from self._blank()
            tagged = yield from self._literal(TAG)
            width = self._kept() if tagged else 0
            if not (yield from self._calls(known=not tagged)):
                self._give_back(width)
            if not (yield from self._content(TAG)):
                return

    def _calls(self, *, known: bool) -> Reading[bool]:
        """Whether there is one at least; if so, what follows the last is not read."""
        found = False
        while True:
            yield from self._blank()
            outcome = yield from self._json_call(known=known)
            if outcome is None:
                if found:
                    self._give_back()
                return found
            found = True
            if not outcome:
                return True
            self._end()
            self._keep()
            yield from self._blank()
            if not (yield from self._literal(";")):
                self._give_back()
                return True
