"""Mistral's calls: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, and of newer models `[TOOL_CALLS]name[ARGS]{...}`,
with `[CALL_ID]` and an identifier before `[ARGS]` or neither of them, once for each call."""

from dashinfer.text.tools.parser import Reading, ToolParser

MARK, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


class MistralParser(ToolParser):
    def _parse(self) -> Reading[None]:
        while (yield from self._content(MARK)):
            self._keep()
            self._at += len(MARK)
            character = yield from self._blank()
            if character == "[":
                self._at += 1
                yield from self._listed()
            else:
                outcome = yield from (self._json_call(known=False) if character == "{" else self._named())
                if outcome is None:
                    self._give_back(len(MARK))
                elif outcome:
                    self._end()

    def _listed(self) -> Reading[None]:
        first = True
        while True:
            yield from self._blank()
            outcome = yield from self._json_call(known=False)
            if outcome is None:
                self._give_back(len(MARK) if first else 0)
                return
            if not outcome:
                return
            self._end()
            first = False
            self._keep()
            character = yield from self._blank()
            if character != ",":
                if character == "]":
                    self._at += 1
                    self._mark = None
                else:
                    self._give_back()
                return
            self._at += 1

    def _named(self) -> Reading[bool | None]:
        name = yield from self._word()
        if (yield from self._literal(CALL_ID)):
            yield from self._word()
        yield from self._literal(ARGS)
        if not name or (yield from self._blank()) != "{":
            return None
        self._begin(name)
        return (yield from self._json(self._argue))
