"""A file of conversations as questions: JSON or JSONL, in the shapes that people have them in.

    {"prompt": "..."}                                                          text
    {"messages": [{"role": "user", "content": "..."}, ...]}                    as OpenAI's API has them
    {"body": {"messages": [...]}}                                              a line of an OpenAI batch
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}   ShareGPT

Of `messages` all up to the last one of the user are asked, of a ShareGPT conversation all up to the first. `output_tokens`,
`max_tokens` or `max_completion_tokens` beside them is the answer's length; else that of the recorded answer that follows, at
four characters a token.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dashinfer.bench.questions import Question
from dashinfer.bench.settings import Settings
from dashinfer.errors import BenchError

CHARACTERS_A_TOKEN = 4
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
LENGTHS = ("output_tokens", "max_tokens", "max_completion_tokens")


def read_dataset(path: Path, settings: Settings, output_tokens: int | None) -> list[Question]:
    """The file's questions, in its order. ShareGPT conversations that nobody asks or answers anything in are left out.

    Args:
        output_tokens: the length of all answers; None: see this module's docstring, and `settings.output_tokens` for the rest.

    Raises:
        BenchError: it cannot be read, a record has none of the shapes, or no question is left.
    """
    found = []
    try:
        for place, record in _records(path.read_text(encoding="utf-8")):
            question = _question(place, record, settings, output_tokens)
            if question is not None:
                found.append(question)
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read --dataset {path}: {getattr(error, 'strerror', None) or error}") from None
    except ValueError as error:
        raise BenchError(f"--dataset {path}, {error}") from None
    if not found:
        raise BenchError(f"--dataset {path} has no question")
    return found


def _records(text: str) -> Iterator[tuple[str, Any]]:
    """Records, and where each is. Raises ValueError."""
    if text.lstrip().startswith("["):
        for number, record in enumerate(_decode("the whole", text), start=1):
            yield f"record {number}", record
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _decode(f"line {number}", line)


def _decode(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error}") from None


def _question(place: str, record: Any, settings: Settings, output_tokens: int | None) -> Question | None:
    """Raises ValueError."""
    record = record.get("body", record) if isinstance(record, dict) else record
    if not isinstance(record, dict):
        raise ValueError(f"{place}: not an object")
    if isinstance(prompt := record.get("prompt"), str):
        asked, answer = [{"role": "user", "content": prompt}], None
    elif isinstance(record.get("messages"), list):
        asked, answer = _split(place, record["messages"], last=True)
    elif isinstance(record.get("conversations"), list):
        asked, answer = _split(place, [_message(place, turn) for turn in record["conversations"]], last=False)
        if not asked or answer is None:
            return None
    else:
        raise ValueError(f'{place}: none of "prompt", "messages" and "conversations"')
    if not asked:
        raise ValueError(f"{place}: no message of the user")
    content = asked[-1].get("content")
    if settings.endpoint == "completions" and (len(asked) > 1 or not isinstance(content, str)):
        raise ValueError(f"{place}: more than a prompt; use --endpoint chat")
    if not content or not isinstance(content, str | list):
        raise ValueError(f"{place}: a message without content")
    length = output_tokens or _length(place, record, answer) or settings.output_tokens
    return Question(content=content, output_tokens=length, before=tuple(asked[:-1]))


def _message(place: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise ValueError(f"{place}: a turn without a value")
    role = str(turn.get("from"))
    return {"role": SHAREGPT_ROLES.get(role, role), "content": turn["value"]}


def _split(place: str, messages: list[Any], *, last: bool) -> tuple[list[dict[str, Any]], str | None]:
    """Messages up to the user's last (or first) one, and the recorded answer to it."""
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{place}: a message that is not an object")
    places = [index for index, message in enumerate(messages) if message.get("role") == "user"]
    if not places:
        return [], None
    at = places[-1] if last else places[0]
    after = messages[at + 1] if at + 1 < len(messages) else {}
    answer = after.get("content") if after.get("role") == "assistant" else None
    return messages[: at + 1], answer if isinstance(answer, str) else None


def _length(place: str, record: dict[str, Any], answer: str | None) -> int | None:
    for name in LENGTHS:
        if (value := record.get(name)) is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{place}: {name} is not a number of tokens")
            return value
    return None if answer is None else max(len(answer) // CHARACTERS_A_TOKEN, 1)
