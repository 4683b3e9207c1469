"""`AnswerPlan`: what is to be found in the text of a request's answer, thinking and calls, and what the text must look like.

Knows the request and the model's formats; nothing of tokens in flight.
"""

from dataclasses import dataclass
from typing import Any

from dashinfer.errors import InvalidRequest
from dashinfer.guidance.spec import Constraint
from dashinfer.protocol.chat import ChatCompletionRequest
from dashinfer.serving.service import TextModel
from dashinfer.text.output import OutputParser
from dashinfer.text.reasoning import ReasoningSplitter
from dashinfer.text.thinking import thinking_rules, whole_output
from dashinfer.text.tools.grammar import Function, call_grammar


@dataclass(frozen=True)
class AnswerPlan:
    """One request's.

    Attributes:
        constraint: what an output must look like, the thinking in it included; None for any text.
        shown_tokens: special tokens that mark thinking or calls.
        one_call: an answer ends with its first call.
    """

    constraint: Constraint | None
    shown_tokens: frozenset[int]
    one_call: bool
    _text: TextModel
    _inside: bool | None  # the output begins with thinking; None: it cannot have any
    _schemas: dict[str, dict[str, Any]]

    def parser(self) -> OutputParser | None:
        """For one choice; None where all of its text is content."""
        reasoning = tools = None
        if self._inside is not None:
            assert self._text.reasoning is not None
            reasoning = ReasoningSplitter(self._text.reasoning, inside=self._inside)
        if self._schemas:
            assert self._text.tools is not None
            tools = self._text.tools.parser(self._schemas, max_calls=1 if self.one_call else None)
        return None if reasoning is None and tools is None else OutputParser(reasoning, tools)


def template_kwargs(request: ChatCompletionRequest, text: TextModel) -> dict[str, Any]:
    """Names for the chat template: `reasoning_effort` and `verbosity` where it reads them; the request's own go before all."""
    kwargs: dict[str, Any] = {}
    if (effort := request.reasoning_effort) is not None:
        if "reasoning_effort" in text.template.reads:
            kwargs["reasoning_effort"] = effort
        if effort == "none" and "enable_thinking" in text.template.reads:
            kwargs["enable_thinking"] = False
    if request.verbosity is not None and "verbosity" in text.template.reads:
        kwargs["verbosity"] = request.verbosity
    return kwargs | request.chat_template_kwargs


def plan_answer(request: ChatCompletionRequest, text: TextModel, prompt: str) -> AnswerPlan:
    """
    Args:
        prompt: as the template has rendered it.

    Raises:
        InvalidRequest: tools or a bound on thinking that the model has no way for, or a schema that cannot be enforced.
    """
    functions = [
        Function(function.name, function.parameters or {}, strict=bool(function.strict)) for function in request.functions()
    ]
    if functions:
        _check_tools(text)
    inside = _inside(request, text, prompt)
    if request.max_thinking_tokens is not None and text.reasoning is None:
        raise InvalidRequest(
            "`max_thinking_tokens`: this model does not think, or not in a way that this server knows",
            param="max_thinking_tokens",
            code="unsupported_parameter",
        )
    markers = list(text.tools.markers) if functions and text.tools is not None else []
    if text.reasoning is not None and inside is not None:
        markers += [text.reasoning.opens, text.reasoning.closes]
    ids = (text.tokenizer.marker_id(marker) for marker in markers)
    return AnswerPlan(
        constraint=_constraint(request, text, functions, inside),
        shown_tokens=frozenset(token for token in ids if token is not None),
        one_call=request.max_calls == 1,
        _text=text,
        _inside=inside,
        _schemas={function.name: dict(function.schema) for function in functions},
    )


def _check_tools(text: TextModel) -> None:
    if text.tools is None:
        raise InvalidRequest(
            "`tools`: how this model writes calls is not known; if it does, start the server with --tool-call-parser",
            param="tools",
            code="unsupported_parameter",
        )
    if "tools" not in text.template.for_tools.reads:
        raise InvalidRequest("`tools`: the model's chat template takes none", param="tools", code="unsupported_parameter")


def _inside(request: ChatCompletionRequest, text: TextModel, prompt: str) -> bool | None:
    """Whether the output begins with thinking; None where it has none."""
    if text.reasoning is None:
        return None
    if not request.add_generation_prompt:
        final = request.messages[-1].content if request.continue_final_message else ""
        open_ = isinstance(final, str) and final.rfind(text.reasoning.opens) > final.rfind(text.reasoning.closes)
        return True if open_ else None
    if prompt.rstrip().endswith(text.reasoning.closes):
        return None
    return text.reasoning.begins_inside(prompt)


def _constraint(
    request: ChatCompletionRequest, text: TextModel, functions: list[Function], inside: bool | None
) -> Constraint | None:
    answer = request.constraint()
    required = request.call_required
    calls = None
    if functions and (required or answer is not None or any(function.strict for function in functions)):
        assert text.tools is not None
        if answer is not None and not required and text.tools.name == "llama3_json":
            raise InvalidRequest(
                f"`{answer.param}` does not go with `tools` here: this model's calls are JSON themselves", param=answer.param
            )
        try:
            calls = call_grammar(
                text.tools.name,
                text.tools.style,
                functions,
                required=required or answer is not None,
                parallel=request.max_calls != 1,
                token_id=text.tokenizer.marker_id,
                rule="calls",
            )
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"`tools`: {error}", param="tools") from None
    if required:
        answer = None
    thinking: list[str] = []
    bounded = request.max_thinking_tokens is not None and inside is not None
    if text.reasoning is not None and inside is not None and (bounded or calls is not None or answer is not None):
        try:
            thinking = thinking_rules(
                text.reasoning,
                inside=inside,
                token_id=text.tokenizer.marker_id,
                max_tokens=request.max_thinking_tokens,
            )
        except ValueError as error:
            raise InvalidRequest(f"`max_thinking_tokens`: {error}", param="max_thinking_tokens") from None
    if not thinking and calls is None:
        return answer
    return whole_output(
        thinking=thinking, calls=calls, answer=answer, param="max_thinking_tokens" if calls is None else "tools"
    )
