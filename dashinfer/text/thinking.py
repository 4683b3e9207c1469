"""`after_thinking`: a constraint on an answer that thinking may precede, and bounds on the length of that.

The thinking itself is free text. Its markers are tokens in the vocabularies of models that think; where they are not, their
text is what counts.
"""

from collections.abc import Callable

from dashinfer.guidance.spec import Constraint, text_term
from dashinfer.text.reasoning import ReasoningFormat
from dashinfer.text.tools.grammar import without_term

_ANY_TOKENS = "start: token*\ntoken: <[*]>\n"


def after_thinking(
    constraint: Constraint | None,
    format: ReasoningFormat,
    *,
    inside: bool,
    token_id: Callable[[str], int | None],
    max_tokens: int | None = None,
) -> Constraint:
    """
    Args:
        constraint: of the answer; None leaves it free.
        inside: the output begins with thinking; otherwise it may.
        token_id: of a text that is a token by itself, `Tokenizer.marker_id`.
        max_tokens: after which the end of the thinking is forced, in tokens, its markers not counted.

    Raises:
        ValueError: a bound, and no token that ends the thinking.
    """
    opens, closes = token_id(format.opens), token_id(format.closes)
    options = "" if max_tokens is None else f"[max_tokens={max_tokens}]"
    if closes is None:
        if max_tokens is not None:
            raise ValueError("the model has no token that ends its thinking")
        thinking = "thought"
        rules = [f"thought[lazy]: /(.|\\n)*/ {text_term(format.closes)}"]
    elif max_tokens == 0:
        thinking, rules = f"<[{closes}]>", []
    else:
        thinking = f"thought <[{closes}]>"
        # The marker spelled with other tokens would end the thinking for a reader, too.
        rules = [f"thought{options}: THOUGHT", f"THOUGHT: {without_term(format.closes)}"]
    before = f"{thinking} BLANK"
    if not inside:
        opening = text_term(format.opens) if opens is None else f"<[{opens}]>"
        before = f"({opening} {before})?" if not format.always else f"{opening}? {before}"
    rules.append(r"BLANK: /\n{0,2}/")
    answer = constraint or Constraint(_ANY_TOKENS, "max_thinking_tokens")
    return answer.after("\n".join([before, *rules]))
