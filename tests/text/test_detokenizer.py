from hypothesis import given, settings
from hypothesis import strategies as st

from dashinfer.text.detokenizer import IncrementalDetokenizer, StopString
from dashinfer.text.tokenizer import Tokenizer

PIECES = [
    "the",
    " cat",
    " ",
    "STOP",
    "ST",
    "O",
    "P",
    "aab",
    "aaab",
    "\n",
    "ñ",
    "你",
    "👩‍👩‍👧",
    "🙂",
    "<|im_end|>",
    "</s>",
    "<",
    "é",
]
STOPS = ["STOP", "aab", "TO", " cat", "👩", "\u200d", "the cat", "P", "</s>", "ab", "aaab", "🙂🙂"]


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By the definition: shorten the text from the front until some stop string is complete, and take the longest."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@st.composite
def chunked(draw: st.DrawFn, ids: list[int]) -> list[list[int]]:
    chunks, at = [], 0
    while at < len(ids):
        size = draw(st.integers(0, 4))
        chunks.append(ids[at : at + size])
        at += size
    return chunks


def check(data: st.DataObject, tokenizer: Tokenizer, ids: list[int], stops: list[str], skip: bool) -> None:
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    expected, stop = first_stop(whole, stops)
    detokenizer = IncrementalDetokenizer(tokenizer, stop=[StopString(stop) for stop in stops], skip_special_tokens=skip)
    shown = ""
    for chunk in data.draw(chunked(ids)):
        shown += detokenizer.push(chunk)

        assert expected.startswith(shown)
    shown += detokenizer.finish()

    assert shown == expected
    assert detokenizer.stopped == stop
    assert detokenizer.push(ids) == "" or stop is None


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    pieces=st.lists(st.sampled_from(PIECES), max_size=12),
    stops=st.lists(st.sampled_from(STOPS), max_size=4, unique=True),
    skip=st.booleans(),
)
def test_texts(
    byte_level: Tokenizer, sentencepiece: Tokenizer, data: st.DataObject, pieces: list[str], stops: list[str], skip: bool
) -> None:
    for tokenizer in (byte_level, sentencepiece):
        check(data, tokenizer, tokenizer.encode("".join(pieces)), stops, skip)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), stops=st.lists(st.sampled_from(STOPS), max_size=4, unique=True), skip=st.booleans())
def test_any_tokens(byte_level: Tokenizer, sentencepiece: Tokenizer, data: st.DataObject, stops: list[str], skip: bool) -> None:
    for tokenizer in (byte_level, sentencepiece):
        check(data, tokenizer, data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40)), stops, skip)


def stream(detokenizer: IncrementalDetokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push([token]) for token in ids), detokenizer.finish()]


def test_no_half_characters(tokenizer: Tokenizer) -> None:
    parts = stream(IncrementalDetokenizer(tokenizer), tokenizer.encode("🙂"))

    assert "".join(parts) == "🙂"
    assert {*parts} == {"", "🙂"}


def test_an_unfinished_character_is_flushed(tokenizer: Tokenizer) -> None:
    assert "".join(stream(IncrementalDetokenizer(tokenizer), tokenizer.encode("the🙂")[:-1])) == "the\ufffd"


def test_text_of_a_stop_string_that_never_finished_is_shown(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, stop=[StopString("STOP")])

    assert detokenizer.push(byte_level.encode("go STO")) == "go "
    assert detokenizer.push(byte_level.encode("NE ST")) == "STONE "
    assert detokenizer.finish() == "ST"
    assert detokenizer.stopped is None


def test_nothing_after_a_stop_string(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, stop=[StopString("STOP")])

    assert detokenizer.push(byte_level.encode("go STOP and on")) == "go "
    assert detokenizer.stopped == "STOP"
    assert (detokenizer.push(byte_level.encode("more")), detokenizer.finish()) == ("", "")


def test_the_first_space_is_spelling_unless_the_text_continues(sentencepiece: Tokenizer) -> None:
    ids = [sentencepiece._tokenizer.token_to_id("▁the"), sentencepiece._tokenizer.token_to_id("▁cat")]

    assert stream(IncrementalDetokenizer(sentencepiece), ids) == ["the", " cat", ""]
    assert stream(IncrementalDetokenizer(sentencepiece, continues=True), ids) == [" the", " cat", ""]


def test_the_cost_of_a_push_does_not_grow(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, stop=[StopString("a" * 1000)])
    for _ in range(200):
        detokenizer.push(byte_level.encode("aaaa b"))

    assert len(detokenizer._held) <= 1000
