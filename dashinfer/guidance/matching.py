"""Matchers of llguidance, within limits: how much a grammar may be, and how much work a token.

The limits bound what one grammar costs in time and memory once it is compiled. They do not hold while it is: a long chain of
rules overflows the stack, and some keywords take as long as their numbers are large. So `dashinfer.guidance.check` goes first.
"""

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_LENGTH = 1 << 18  # characters of a grammar
# What a grammar's lexer may be made of. It bounds the work for one mask, too, which is why it is less than the library's.
LEXER_FUEL = 200_000
MAX_SYMBOLS = 100_000  # of all rules together


def new_matcher(vocabulary: "LLTokenizer", grammar: str) -> "LLMatcher":
    """A matcher at the beginning of an output; one that is in error where the grammar cannot be used. Releases the GIL."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(initial_lexer_fuel=LEXER_FUEL, max_grammar_size=MAX_SYMBOLS, verbose_errors=False)
    return LLMatcher(vocabulary, grammar, log_level=0, limits=limits)


def to_lark(grammar: str) -> str:
    """GBNF as Lark, by itself or among the grammars of llguidance's JSON, and anything else as it is.

    Raises:
        ValueError: it looks like GBNF and is none.
    """
    if "::=" not in grammar:
        return grammar
    if grammar.startswith("{"):
        whole = json.loads(grammar)
        for part in whole.get("grammars", ()):
            if "lark_grammar" in part:
                part["lark_grammar"] = to_lark(part["lark_grammar"])
        return json.dumps(whole)
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except RecursionError:
        raise ValueError("the grammar is nested too deeply") from None
    except Exception as error:  # the library's own class, and what its parser stumbles over
        raise ValueError(f"the grammar is no GBNF: {error}") from None
