"""Calls as a Python list, instead of an answer: `[f(a=1, b="x"), g()]`. Arguments are literals and go by their names; they are
passed on one at a time. Only functions that the request has make a call."""

import json

from dashinfer.text.tools.parser import Reading, ToolParser
from dashinfer.text.tools.python_literal import json_of

START, END = "<|python_start|>", "<|python_end|>"


class PythonicParser(ToolParser):
    def _parse(self) -> Reading[None]:
        self._keep()
        yield from self._blank()
        yield from self._literal(START)
        character = yield from self._blank()
        if character == "[":
            self._at += 1
            yield from self._calls()
        else:
            self._give_back()
        yield from self._content()

    def _calls(self) -> Reading[None]:
        while True:
            yield from self._blank()
            name = yield from self._known_name()
            if not name:
                self._give_back()
                return
            self._begin(name)
            if not (yield from self._arguments()):
                return
            self._end()
            self._keep()
            character = yield from self._blank()
            if character == ",":
                self._at += 1
                continue
            if character == "]":
                self._at += 1
                self._mark = None
                yield from self._blank()
                yield from self._literal(END)
            else:
                self._give_back()
            return

    def _known_name(self) -> Reading[str]:
        """Reads the name of a function of the request with the bracket after it; "" where another one comes."""
        size = 0
        while (character := (yield from self._see(size))) != "(":
            size += 1
            begin = self._text[self._at : self._at + size]
            if not character or not any(name.startswith(begin) for name in self._tools):
                return ""
        name = self._text[self._at : self._at + size]
        self._at += size + 1
        return name if name in self._tools else ""

    def _arguments(self) -> Reading[bool]:
        """Up to and with the closing bracket; False where they break off, which is given back."""
        self._argue("{")
        count = 0
        while True:
            self._keep()
            character = yield from self._blank()
            if count and character == ",":
                self._at += 1
                character = yield from self._blank()
            elif count and character != ")":
                break
            if character == ")":
                self._at += 1
                self._mark = None
                self._argue("}")
                return True
            name = yield from self._word()
            if not name or (yield from self._blank()) != "=":
                break
            self._at += 1
            value = yield from self._value()
            if value is None:
                break
            self._argue(f"{', ' if count else ''}{json.dumps(name, ensure_ascii=False)}: {value}")
            count += 1
        self._give_back()
        return False

    def _value(self) -> Reading[str | None]:
        """JSON of a value, up to the comma or bracket that ends it; None where it is no literal."""
        size, depth = 0, 0
        quote = ""
        while character := (yield from self._see(size)):
            if quote:
                if character == "\\":
                    size += 1
                    yield from self._see(size)
                elif character == quote[0] and (yield from self._follows(size, quote)):
                    size += len(quote) - 1
                    quote = ""
            elif character in "'\"":
                quote = character * 3 if (yield from self._follows(size, character * 3)) else character
                size += len(quote) - 1
            elif character in "([{":
                depth += 1
            elif character in ")]}" and depth:
                depth -= 1
            elif character in ",)" and not depth:
                try:
                    value = json_of(self._text[self._at : self._at + size])
                except ValueError:
                    return None
                self._at += size
                return value
            size += 1
        return None

    def _follows(self, offset: int, word: str) -> Reading[bool]:
        for i, character in enumerate(word):
            if (yield from self._see(offset + i)) != character:
                return False
        return True
