"""`whole_output`: one grammar for thinking, calls and an answer, each of which may be constrained or free.

The thinking itself is free text, whose length may be bounded. Its markers are tokens in the vocabularies of models that think;
where they are not, their text is what counts.
"""

import json
from collections.abc import Callable, Sequence

from dashinfer.guidance.spec import Constraint, text_term
from dashinfer.text.reasoning import ReasoningFormat
from dashinfer.text.tools.grammar import without_term


def whole_output(
    *, thinking: Sequence[str] = (), calls: str | None = None, answer: Constraint | None = None, param: str
) -> Constraint:
    """
    Args:
        thinking: rules from `thinking_rules`, where an output may begin so.
        calls: rules of which the first is `calls`, for an output that is calls instead of an answer.
        answer: None leaves it free where there are no calls; with calls, there is none then.
        param: the request's field that an error is blamed on where it cannot be the answer's.
    """
    parts = [rule for rule, given in (("calls", calls), ("@answer", answer)) if given is not None] or ["token*"]
    rules = [f"start: {'thinking ' if thinking else ''}({' | '.join(parts)})", *thinking]
    if calls is not None:
        rules.append(calls.rstrip("\n"))
    if parts == ["token*"]:
        rules.append("token: <[*]>")
    whole = "\n".join([*rules, ""])
    if answer is None:
        return Constraint(whole, param)
    if not thinking and calls is None:
        return answer
    named = {"name": "answer", "lark_grammar": answer.grammar}
    return Constraint(json.dumps({"grammars": [{"lark_grammar": whole}, named]}), answer.param)


def thinking_rules(
    format: ReasoningFormat, *, inside: bool, token_id: Callable[[str], int | None], max_tokens: int | None = None
) -> list[str]:
    """Rules of which the first is `thinking`.

    Args:
        inside: the output begins with thinking; otherwise it may.
        token_id: of a text that is a token by itself, `Tokenizer.marker_id`.
        max_tokens: after which the end of the thinking is forced, in tokens, its markers not counted.

    Raises:
        ValueError: a bound, and no token that ends the thinking.
    """
    opens, closes = token_id(format.opens), token_id(format.closes)
    if closes is None:
        if max_tokens is not None:
            raise ValueError("the model has no token that ends its thinking")
        thinking = "thought"
        rules = [f"thought[lazy]: /(.|\\n)*/ {text_term(format.closes)}"]
    elif max_tokens == 0:
        thinking, rules = f"<[{closes}]>", []
    else:
        thinking = f"thought <[{closes}]>"
        options = "" if max_tokens is None else f"[max_tokens={max_tokens}]"
        # The marker spelled with other tokens would end the thinking for a reader, too.
        rules = [f"thought{options}: THOUGHT", f"THOUGHT: {without_term(format.closes)}"]
    thinking += " BLANK"
    if not inside:
        opening = text_term(format.opens) if opens is None else f"<[{opens}]>"
        thinking = f"{opening}? {thinking}" if format.always else f"({opening} {thinking})?"
    return [f"thinking: {thinking}", *rules, r"BLANK: /\n{0,2}/"]
