"""What a request's output must look like: a grammar as text, before anything has read it.

Knows how each kind of constraint is written in the Lark dialect of llguidance (its `docs/syntax.md`), and nothing of compiling.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Between the tokens of JSON: a space, or a line's end and an indentation. Without a bound, a model may write blanks for ever.
WHITESPACE = r"( |\r?\n[ \t]{0,60})"


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar that the whole output of a choice matches.

    Attributes:
        grammar: in llguidance's Lark dialect, with a rule `start`; in GBNF, with a rule `root`; or llguidance's JSON.
        param: the request's field that an error in it is blamed on.
    """

    grammar: str
    param: str

    @classmethod
    def from_schema(cls, schema: dict[str, Any] | bool, param: str, *, lenient: bool = False) -> "Constraint":
        """JSON that a JSON Schema admits, properties in the schema's order; with `lenient`, keywords that cannot be
        enforced are ignored rather than refused.

        Raises:
            ValueError: a number in it is not finite.
        """
        return cls(f"start: {schema_term(schema, lenient=lenient)}\n", param)

    @classmethod
    def json_object(cls, param: str) -> "Constraint":
        """Any JSON object."""
        return cls.from_schema({"type": "object"}, param)

    @classmethod
    def from_regex(cls, pattern: str, param: str) -> "Constraint":
        """Text that a regular expression of Rust's `regex` crate matches as a whole, without look-around."""
        return cls(f"start: {regex_term(pattern)}\n", param)

    @classmethod
    def from_choice(cls, choices: Sequence[str], param: str) -> "Constraint":
        """One of some texts; of those there is at least one."""
        return cls(f"start: CHOICE\nCHOICE: {' | '.join(map(text_term, choices))}\n", param)

    def after(self, before: str) -> "Constraint":
        """The same behind something else; `before` is the right side of a rule."""
        whole = {"lark_grammar": f"start: before @answer\nbefore: {before}\n"}
        answer = {"name": "answer", "lark_grammar": self.grammar}
        return Constraint(json.dumps({"grammars": [whole, answer]}), self.param)


def schema_term(schema: dict[str, Any] | bool, *, lenient: bool = False, whitespace: str = WHITESPACE) -> str:
    """A term of a rule's right side for JSON that a schema admits; `lenient` as above. `whitespace` is a regular expression
    for what may stand between its tokens.

    Raises:
        ValueError: a number in it is not finite.
    """
    options = {"whitespace_pattern": whitespace, "lenient": lenient}
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return "%json " + json.dumps({**schema, "x-guidance": options}, allow_nan=False)


def regex_term(pattern: str) -> str:
    """A term for text that a regular expression matches as a whole."""
    escaped, after_backslash = [], False
    for character in pattern:
        if character == "\n":
            escaped.append("n" if after_backslash else "\\n")
        else:
            escaped.append("\\/" if character == "/" and not after_backslash else character)
        after_backslash = character == "\\" and not after_backslash
    return f"/{''.join(escaped)}/"


def text_term(text: str) -> str:
    """A term for exactly this text."""
    return json.dumps(text)
