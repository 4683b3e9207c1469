"""`ChatTemplate`: messages to a prompt, with the model's own Jinja template.

Owns the sandbox that templates run in and the names they may use; the conventions are those of transformers'
`apply_chat_template`, so that a prompt is the same text there and here. Knows nothing of tokens. Templates come with a model
and never with a request. Objects do not change and are safe to share between threads.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dashinfer.errors import InvalidRequest, UnsupportedModel
from dashinfer.sources import TokenizerFiles

ContentFormat = Literal["string", "parts"]

# What `chat_template_kwargs` cannot set: each of these is said in another way, or by the model.
RESERVED_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    | {f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")}
)

# What a template, which is a program from somebody else, can end in besides jinja's own errors.
_TEMPLATE_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)

# Marks where a final message ends. The space at its end tells whether the template keeps trailing space or trims it.
_OPEN_END = "\ue000open end\ue001 "


class _Refusal(jinja2.TemplateError):
    """The template itself called `raise_exception`."""


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the model wrote, for training; here its content is rendered like any other."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _now
    return environment


def content_format(tree: nodes.Template) -> ContentFormat:
    """Whether a template goes through the parts of a content itself, or wants one string.

    It does where a loop's subject is an attribute or item `content` of something (`message.content`, `message['content']`), or
    a name that such a value was assigned to.
    """
    names = set()
    for assignment in tree.find_all(nodes.Assign):
        if _reads_content(assignment.node) and isinstance(assignment.target, nodes.Name):
            names.add(assignment.target.name)
    for loop in tree.find_all(nodes.For):
        subject = loop.iter
        while isinstance(subject, nodes.Filter | nodes.Getitem) and not _reads_content(subject):
            subject = subject.node  # `content | selectattr(...)`, `content[1:]`
        if _reads_content(subject) or (isinstance(subject, nodes.Name) and subject.name in names):
            return "parts"
    return "string"


def _tests_content_for(tree: nodes.Template, *tests: str) -> bool:
    """Whether the template asks anywhere `is TEST`, as in `message.content is string`."""
    return any(test.name in tests for test in tree.find_all(nodes.Test))


def _reads_content(node: nodes.Node | None) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


class ChatTemplate:
    """Attributes:
    content_format: "parts" where the template goes through lists of content parts itself, else "string".
    source: the template's text, "" where there is none.
    reads: the names that the template reads, such as `tools` or `enable_thinking`.
    for_tools: what chats with tools are rendered with: this one, or the model's other one.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str], tool_source: str | None = None) -> None:
        """Without a source, rendering raises. `tool_source` is for chats with tools, instead of the source.

        Raises:
            UnsupportedModel: a source is not valid Jinja.
        """
        self._special_tokens = dict(special_tokens)
        self._template: jinja2.Template | None = None
        self.content_format: ContentFormat = "string"
        self.source = source or ""
        self.reads: frozenset[str] = frozenset()
        self.for_tools: ChatTemplate = self if tool_source is None else ChatTemplate(tool_source, special_tokens)
        self._wraps_strings = False  # the template knows lists of parts only
        self._knows_developer = False  # the template has that role beside "system"
        self._knows_null = False  # the template looks for contents that are null
        if source is None:
            return
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UnsupportedModel(f"the model's chat template is not valid: {error}") from error
        self.content_format = content_format(tree)
        self.reads = frozenset(name.name for name in tree.find_all(nodes.Name) if name.ctx == "load")
        self._wraps_strings = self.content_format == "parts" and not _tests_content_for(tree, "string", "iterable", "mapping")
        self._knows_developer = "developer" in source
        self._knows_null = _tests_content_for(tree, "none")

    @classmethod
    def from_files(cls, files: TokenizerFiles, special_tokens: Mapping[str, str]) -> "ChatTemplate":
        """`special_tokens` from `Tokenizer.special_tokens`. A model without a template is fine until it is to chat."""
        return cls(files.chat_template, special_tokens, files.tool_template)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt, to be encoded with `add_special_tokens=False`: the template writes those it wants.

        `messages` are plain dictionaries as from `ChatCompletionRequest.template_messages()`; they are not changed. With
        `continue_final_message` the prompt ends with the last message's text, left open, and there is no generation prompt.
        `tools` are plain dictionaries too, as from `template_tools()`.

        Raises:
            InvalidRequest: no template, the template refuses the messages or fails on them, a reserved name in `kwargs`.
        """
        if tools and self.for_tools is not self:
            return self.for_tools.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                kwargs=kwargs,
                tools=tools,
            )
        if self._template is None:
            raise InvalidRequest("this model has no chat template, so it cannot take chat messages", param="messages")
        kwargs = kwargs or {}
        if reserved := sorted(RESERVED_NAMES & kwargs.keys()):
            raise InvalidRequest(f"chat_template_kwargs cannot set {', '.join(reserved)}", param="chat_template_kwargs")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        shown = [self._prepared(message) for message in messages]
        if continue_final_message:
            shown[-1] = _opened(shown[-1])
        try:
            prompt = self._template.render(
                {
                    **self._special_tokens,
                    **kwargs,
                    "messages": shown,
                    "tools": None if tools is None else list(tools),
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except _Refusal as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error
        except _TEMPLATE_FAILURES as error:
            raise InvalidRequest(
                f"the model's chat template fails on these messages: {type(error).__name__}: {error}", param="messages"
            ) from error
        return _cut_at_open_end(prompt) if continue_final_message else prompt

    def _prepared(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if content is None and not self._knows_null:
            content = ""
        if isinstance(content, list) and self.content_format == "string":
            if any(part["type"] != "text" for part in content):
                raise InvalidRequest("the model's chat template takes text only, no images and videos", param="messages")
            content = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and self._wraps_strings:
            content = [{"type": "text", "text": content}]
        prepared = {**message, "content": content}
        if message["role"] == "developer" and not self._knows_developer:
            prepared["role"] = "system"  # OpenAI's newer name for it
        return prepared


def _opened(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + _OPEN_END}
    if isinstance(content, list) and content:
        last = content[-1]
        if last["type"] != "text":
            raise InvalidRequest("continue_final_message is set, but the final message ends with no text", param="messages")
        return {**message, "content": [*content[:-1], {**last, "text": last["text"] + _OPEN_END}]}
    raise InvalidRequest("continue_final_message is set, but the final message has no text to continue", param="messages")


def _cut_at_open_end(prompt: str) -> str:
    position = prompt.rfind(_OPEN_END.rstrip())
    if position < 0:
        raise InvalidRequest(
            "continue_final_message is set, but the model's chat template leaves the final message out", param="messages"
        )
    kept_space = prompt.startswith(_OPEN_END, position)
    return prompt[:position] if kept_space else prompt[:position].rstrip()
