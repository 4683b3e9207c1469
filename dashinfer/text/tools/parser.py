"""`ToolParser`: the text of one output to content and calls, as it grows. Base of the parsers of each format.

A format's `_parse` is a generator that reads character by character and yields where it needs more text, so that what it finds
does not depend on how the text was cut. Before a call is begun, its text is kept, and becomes content if it is no call after
all: nothing is lost but white space between calls and what stands beside them. A call begins once its name is known and its
arguments have begun. Arguments are passed on while they are JSON; from where they are none, the text is content again, and
what was passed on does not parse.

Knows nothing of tokens: markers of calls that are special tokens arrive as text like any other.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

from dashinfer.text.tools.events import Arguments, CallBegin, Content, Event, merged

T = TypeVar("T")
Reading = Generator[None, None, T]  # yields where it needs more text
Emit = Callable[[str], Any]

BLANK = " \t\r\n"
_MAX_WORD = 256  # characters of a name
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR_PART = re.compile(r"[-+.\w]*")
_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null", re.ASCII)
_HEX = frozenset("0123456789abcdefABCDEF")
_WORD = re.compile(r"[\w.-]*")


class _Full(Exception):
    """All the calls that are wanted were read."""


class ToolParser(ABC):
    """One output's.

    Attributes:
        calls: how many calls were begun.
        full: no more is wanted, since `max_calls` are complete; what is pushed from then on is dropped.
    """

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], *, max_calls: int | None = None) -> None:
        """`tools`: the JSON Schemas of the arguments by the functions' names."""
        self.calls = 0
        self.full = False
        self._tools = tools
        self._max_calls = max_calls
        self._events: list[Event] = []
        self._text = ""
        self._at = 0  # in `_text`
        self._mark: int | None = None  # from where `_text` is kept
        self._ended = False
        self._space = ""  # white space that may stand before a call
        self._after_call = False
        self._run = self._parse()

    def push(self, text: str) -> list[Event]:
        """What is certain now."""
        start = self._at if self._mark is None else self._mark
        kept, self._text = self._text[start:], ""
        kept += text  # in place, where it has no other name: what is held back is not copied at each token
        self._text = kept
        self._at -= start
        if self._mark is not None:
            self._mark = 0
        return self._go_on()

    def finish(self) -> list[Event]:
        """The rest, when no more text comes."""
        self._ended = True
        events = self._go_on()
        return events if self.full or self._after_call else merged([*events, Content(self._space)])

    @abstractmethod
    def _parse(self) -> Reading[None]:
        """Reads the whole output."""

    def _go_on(self) -> list[Event]:
        if not self.full:
            try:
                next(self._run, None)
            except _Full:
                self.full = True
        events, self._events = self._events, []
        return merged(events)

    # What is found

    def _say(self, text: str) -> None:
        """Content. White space at its end waits for what comes next."""
        if self._after_call:
            text = text.lstrip(BLANK)
        text = self._space + text
        shown = text.rstrip(BLANK)
        self._space = text[len(shown) :]
        if shown:
            self._events.append(Content(shown))
            self._after_call = False

    def _begin(self, name: str) -> None:
        self._mark = None
        self._space = ""
        self._events.append(CallBegin(self.calls, name))
        self.calls += 1
        self._after_call = True

    def _argue(self, text: str) -> None:
        self._events.append(Arguments(self.calls - 1, text))

    def _end(self) -> None:
        if self.calls == self._max_calls:
            raise _Full

    # Reading

    def _see(self, offset: int = 0) -> Reading[str]:
        """The character at `offset` from here; "" where the output ends before it."""
        while self._at + offset >= len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at + offset]

    def _blank(self) -> Reading[str]:
        """Reads white space; the character that follows, or ""."""
        while (character := (yield from self._see())) and character in BLANK:
            self._at += 1
        return character

    def _literal(self, word: str) -> Reading[bool]:
        """Reads `word` if it comes next, and else nothing."""
        for offset, character in enumerate(word):
            if (yield from self._see(offset)) != character:
                return False
        self._at += len(word)
        return True

    def _word(self) -> Reading[str]:
        """Reads letters, digits and `_.-`; at most as many as a name may have."""
        size = 0
        while size <= _MAX_WORD and (character := (yield from self._see(size))) and _WORD.fullmatch(character):
            size += 1
        word = self._text[self._at : self._at + size]
        self._at += size
        return word

    def _until(self, word: str) -> Reading[str | None]:
        """Reads up to and with `word`; what stands before it, or None and nothing read where it does not come."""
        looked = 0
        while (found := self._text.find(word, self._at + looked)) < 0:
            looked = max(0, len(self._text) - self._at - len(word) + 1)
            if self._ended:
                return None
            yield
        before = self._text[self._at : found]
        self._at = found + len(word)
        return before

    def _keep(self) -> None:
        """From here on, `_give_back` is possible."""
        self._mark = self._at

    def _give_back(self, width: int = 0) -> None:
        """Back to where `_keep` was; the `width` characters from there are content for certain."""
        assert self._mark is not None
        self._at, self._mark = self._mark, None
        self._say(self._text[self._at : self._at + width])
        self._at += width

    def _kept(self) -> int:
        """Characters read since `_keep`."""
        assert self._mark is not None
        return self._at - self._mark

    def _content(self, *markers: str) -> Reading[str]:
        """Passes on content up to a marker, which is not read: that marker, or "" at the end."""
        while True:
            places = [(place, marker) for marker in markers if (place := self._text.find(marker, self._at)) >= 0]
            if places:
                place, marker = min(places)
                self._say(self._text[self._at : place])
                self._at = place
                return marker
            safe = len(self._text)
            if not self._ended:
                safe -= max((_overlap(self._text, self._at, marker) for marker in markers), default=0)
            self._say(self._text[self._at : safe])
            self._at = safe
            if self._ended:
                return ""
            yield

    # JSON

    def _json(self, emit: Emit) -> Reading[bool]:
        """Reads a JSON value and emits its text; control characters in strings as escapes. False where it breaks off."""
        open_: list[str] = []
        state = "value"
        while True:
            character = yield from self._blank_in(emit)
            if state in ("key", "key or end") and character == '"':
                if not (yield from self._string(emit)):
                    return False
                if (yield from self._blank_in(emit)) != ":":
                    return False
                emit(":")
                self._at += 1
                state = "value"
                continue
            if state == "next" and character == ",":
                emit(",")
                self._at += 1
                state = "key" if open_[-1] == "{" else "value"
                continue
            if character and state in ("value", "value or end") and character in "{[":
                emit(character)
                self._at += 1
                open_.append(character)
                state = "key or end" if character == "{" else "value or end"
                continue
            if open_ and state in ("next", "key or end", "value or end") and character == {"{": "}", "[": "]"}[open_[-1]]:
                emit(character)
                self._at += 1
                open_.pop()
            elif state in ("value", "value or end"):
                if not (yield from (self._string(emit) if character == '"' else self._scalar(emit))):
                    return False
            else:
                return False
            if not open_:
                return True
            state = "next"

    def _blank_in(self, emit: Emit) -> Reading[str]:
        while (character := (yield from self._see())) and character in BLANK:
            emit(character)
            self._at += 1
        return character

    def _string(self, emit: Emit) -> Reading[bool]:
        if (yield from self._see()) != '"':
            return False
        emit('"')
        self._at += 1
        while character := (yield from self._see()):
            if match := _PLAIN.match(self._text, self._at):
                emit(match[0])
                self._at = match.end()
            elif character == '"':
                emit('"')
                self._at += 1
                return True
            elif character == "\\":
                size = 2
                if (kind := (yield from self._see(1))) == "u":
                    for size in range(3, 7):
                        if (yield from self._see(size - 1)) not in _HEX:
                            return False
                elif kind not in tuple('"\\/bfnrt'):
                    return False
                emit(self._text[self._at : self._at + size])
                self._at += size
            else:
                emit(json.dumps(character)[1:-1])
                self._at += 1
        return False

    def _scalar(self, emit: Emit) -> Reading[bool]:
        size = 0
        while (character := (yield from self._see(size))) and _SCALAR_PART.fullmatch(character) and size < _MAX_WORD:
            size += 1
        word = self._text[self._at : self._at + size]
        if not _SCALAR.fullmatch(word):
            return False
        emit(word)
        self._at += size
        return True

    def _decoded_string(self) -> Reading[str | None]:
        """Reads a JSON string: its value; None where there is none."""
        pieces: list[str] = []
        if not (yield from self._string(pieces.append)):
            return None
        return decoded("".join(pieces))

    def _json_call(self, *, known: bool) -> Reading[bool | None]:
        """Reads `{"name": ..., "arguments": {...}}`, or `parameters` for the latter.

        True: it was read, if perhaps not the end of the object. False: it was begun and breaks off here. None: there is no
        call, and what was read is to be given back. With `known`, functions of other names are none.
        """
        name: str | None = None
        begun = complete = False
        kept: str | None = None
        if (yield from self._see()) != "{":
            return None
        self._at += 1
        first = True
        while (character := (yield from self._blank())) != "}":
            if not first:
                if character != ",":
                    return self._broken(begun, complete)
                self._at += 1
                yield from self._blank()
            first = False
            key = yield from self._decoded_string()
            if key is None or (yield from self._blank()) != ":":
                return self._broken(begun, complete)
            self._at += 1
            character = yield from self._blank()
            if key == "name" and name is None:
                name = yield from self._decoded_string()
                if not name or (known and name not in self._tools):
                    return None
            elif key in ("arguments", "parameters") and kept is None and not begun:
                if name is not None and character == "{":
                    self._begin(name)
                    begun = True
                    if not (yield from self._json(self._argue)):
                        return False
                    complete = True
                else:
                    pieces: list[str] = []
                    if not (yield from self._json(pieces.append)):
                        return None
                    kept = "".join(pieces)
            elif not (yield from self._json(lambda _: None)):
                return self._broken(begun, complete)
            if complete:
                self._keep()
        self._at += 1
        if not begun:
            arguments = _object_text(kept)
            if name is None or arguments is None:
                return None
            self._begin(name)
            self._argue(arguments)
        self._mark = None
        return True

    def _broken(self, begun: bool, complete: bool) -> bool | None:
        """What `_json_call` returns where the object breaks off."""
        if complete:
            self._give_back()
        return complete or (False if begun else None)


def _overlap(text: str, start: int, marker: str) -> int:
    """How many characters at the end of `text[start:]` are the begin of `marker`, but not all of it."""
    for size in range(min(len(marker) - 1, len(text) - start), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


def decoded(text: str) -> str | None:
    """The value of a JSON string; None for halves of characters, which nothing can encode."""
    value: str = json.loads(text)
    try:
        value.encode()
    except UnicodeEncodeError:
        return None
    return value


def _object_text(text: str | None) -> str | None:
    """Arguments as an object's JSON text: they may be missing, null, or such a text in a string."""
    if text is None or text == "null":
        return "{}"
    if text.startswith('"'):
        inner = decoded(text)
        try:
            return inner.strip(BLANK) if inner and isinstance(json.loads(inner), dict) else None
        except (ValueError, RecursionError):
            return None
    return text if text.startswith("{") else None
