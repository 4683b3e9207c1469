"""One chat completion, from the body's bytes to the answer's: validate, see, render, tokenise, submit, detokenise, encode.

Knows nothing of routes, headers and connections. A request's life in the engine is the `with` block it was entered into: the
caller's exit stack, which is closed when the HTTP request ends for any reason.

Counting: `completion_tokens` are the tokens the model produced, the one that ended the choice included (as OpenAI counts), up
to and including the token that completed a stop string. `reasoning_tokens` are those of them up to and including the end of
the thinking. Log-probabilities are given for tokens of the text, thinking and calls included, so not for an end token and not
for the token that completed a stop string. Stop strings count anywhere in the text.
"""

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dashinfer.engine.api import EngineAPI, Generation, PromptMedia, TokenOutput
from dashinfer.errors import InvalidRequest, RequestError
from dashinfer.protocol import stream
from dashinfer.protocol.chat import ChatCompletionRequest, ChoiceFinish
from dashinfer.protocol.parse import parse_chat_request
from dashinfer.protocol.sampling import no_room, sampling_params
from dashinfer.serving.answers import AnswerPlan, plan_answer, template_kwargs
from dashinfer.serving.service import Service, TextModel
from dashinfer.text.detokenizer import IncrementalDetokenizer, StopString
from dashinfer.text.tools.events import Arguments, CallBegin, Content, Event, Reasoning, merged
from dashinfer.types import FinishReason, SamplingParams

if TYPE_CHECKING:
    from dashinfer.vision.budget import MediaAccount
    from dashinfer.vision.intake import Seen
    from dashinfer.vision.request import MediumRequest

Buffer = bytes | bytearray
# No vocabulary averages more characters a token than this: a longer prompt need not be tokenised to know that it does not fit.
_MAX_CHARACTERS_PER_TOKEN = 256


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the engine.

    Attributes:
        answer: what is to be found in the output.
        media_tokens: how many of the prompt's tokens stand for images and videos, as `usage` has them; None where the model
            sees nothing.
    """

    request: ChatCompletionRequest
    prompt: list[int]
    params: list[SamplingParams]
    stop: list[StopString]
    answer: AnswerPlan
    media: PromptMedia | None = None
    media_tokens: dict[str, int] | None = None


def _new_seed() -> int:
    return secrets.randbits(63)


def parse(service: Service, body: Buffer) -> ChatCompletionRequest:
    """The request in a body.

    Raises:
        InvalidRequest: the request is at fault.
        ModelNotServed: another model is asked for.
    """
    request = parse_chat_request(body)
    service.check_model(request.model)
    return request


def prepare(engine: EngineAPI, text: TextModel, request: ChatCompletionRequest, seen: "Sequence[Seen]" = ()) -> Prepared:
    """Everything between the messages and the engine; needs no waiting, and is safe to run in a thread.

    Args:
        seen: the request's images and videos.

    Raises:
        InvalidRequest, ContextLengthExceeded: the request is at fault.
    """
    assert engine.info is not None, "an engine that is ready knows its model"
    max_length = engine.info.max_length
    rendered = text.template.render(
        request.template_messages(),
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        kwargs=template_kwargs(request, text),
        tools=request.template_tools(),
    )
    if len(rendered) > max_length * _MAX_CHARACTERS_PER_TOKEN:
        raise no_room(max_length, f"{len(rendered)} characters")
    answer = plan_answer(request, text, rendered)
    media = media_tokens = None
    if text.vision is None:
        prompt = text.tokenizer.encode(rendered, add_special_tokens=False)
        end = len(prompt)
    else:
        from dashinfer.vision.prompt import lay_out

        laid_out = lay_out(rendered, seen, text.vision, text.tokenizer)
        prompt, media, end = laid_out.tokens, laid_out.media, laid_out.end
        media_tokens = {"image_tokens": laid_out.image_tokens, "video_tokens": laid_out.video_tokens}
    params = sampling_params(
        request,
        generation_config=text.generation_config,
        eos_token_ids=text.tokenizer.eos_token_ids,
        vocab_size=engine.info.vocab_size,
        prompt_tokens=end,
        max_length=max_length,
        new_seed=_new_seed,
    )
    return Prepared(request, prompt, params, [StopString(text) for text in request.stop], answer, media, media_tokens)


class _Message:
    """What a whole answer is put together from."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []

    def add(self, event: Event, new_id: Callable[[], str]) -> None:
        match event:
            case Content(text):
                self._content.append(text)
            case Reasoning(text):
                self._reasoning.append(text)
            case CallBegin(_, name):
                self._calls.append((new_id(), name, []))
            case Arguments(index, text):
                self._calls[index][2].append(text)

    def choice(self, index: int, reason: ChoiceFinish, logprobs: list[dict[str, Any]] | None) -> dict[str, Any]:
        calls = [stream.tool_call(id, name, "".join(arguments)) for id, name, arguments in self._calls]
        reasoning = "".join(self._reasoning)
        return stream.choice(index, "".join(self._content), reason, logprobs, reasoning=reasoning, tool_calls=calls)


class _Choice:
    """One choice's way from tokens to content, thinking and calls.

    Attributes:
        tokens: that it has.
        reasoning_tokens: those of the thinking.
        finish: why it ended, or None.
        stopped: it was ended here, so that the engine does not know yet.
    """

    def __init__(self, index: int, prepared: Prepared, text: TextModel) -> None:
        request = prepared.request
        self.index = index
        self.tokens = 0
        self.finish: ChoiceFinish | None = None
        self.stopped = False
        self._text = text
        self._parser = prepared.answer.parser()
        self._thinking_tokens = 0
        self._one_by_one = bool(request.stop) or prepared.answer.one_call
        self._logprobs = request.logprobs
        self._entries: list[dict[str, Any]] = []
        self._detokenizer = IncrementalDetokenizer(
            text.tokenizer,
            stop=prepared.stop,
            skip_special_tokens=request.skip_special_tokens,
            shown_tokens=prepared.answer.shown_tokens,
            continues=request.continue_final_message,
        )

    def push(self, outputs: Sequence[TokenOutput]) -> list[Event]:
        """What can be shown now. Sets `finish` once the choice has ended, by the engine, a stop string or the only call."""
        last = outputs[-1]
        shown = [output for output in outputs if output.finish != "stop"]
        events: list[Event] = []
        start = 0
        while start < len(shown):
            thinking = self._parser is not None and self._parser.thinking
            # One by one, so that what is counted ends where the text does, however many tokens came at once.
            group = shown[start : start + 1] if self._one_by_one or thinking else shown[start:]
            start += len(group)
            self.tokens += len(group)
            self._thinking_tokens += thinking
            events += self._parse(self._detokenizer.push([output.token for output in group]))
            if self._detokenizer.stopped is not None:
                self.stopped = True
                return self._ended("stop", events)
            if self._logprobs:
                for output in group:
                    self._add_logprobs(output)
            if self._parser is not None and self._parser.full:
                self.stopped = last.finish is None or start < len(shown)
                return self._ended("stop", events)
        if last.finish is not None:
            self.tokens += last.finish == "stop"
            events += self._parse(self._detokenizer.finish())
            return self._ended(last.finish, events)
        return merged(events)

    def _parse(self, text: str) -> list[Event]:
        if self._parser is None:
            return [Content(text)] if text else []
        return self._parser.push(text)

    def _ended(self, reason: FinishReason, events: list[Event]) -> list[Event]:
        """With what was held back. Calls are the reason of an answer's end where it is not cut off."""
        self.finish = reason
        if self._parser is not None:
            events += self._parser.finish()
            if self._parser.calls and reason == "stop":
                self.finish = "tool_calls"
        return merged(events)

    @property
    def stop_string(self) -> str | None:
        return self._detokenizer.stopped

    @property
    def reasoning_tokens(self) -> int:
        return self._thinking_tokens if self._parser is not None and self._parser.thought else 0

    def new_call_id(self) -> str:
        assert self._text.tools is not None, "there are calls where they can be read"
        return self._text.tools.new_id()

    def take_logprobs(self) -> list[dict[str, Any]] | None:
        """The entries since the last call; None where none were asked for."""
        if not self._logprobs:
            return None
        entries, self._entries = self._entries, []
        return entries

    def _add_logprobs(self, output: TokenOutput) -> None:
        if self._logprobs:
            assert output.logprobs is not None, "asked for and not delivered"
            self._entries.append(stream.logprob_entry(output.token, output.logprobs, self._text.tokenizer.token_text))


def _by_choice(outputs: list[TokenOutput]) -> dict[int, list[TokenOutput]]:
    if len(outputs) == 1:
        return {outputs[0].index: outputs}
    grouped: dict[int, list[TokenOutput]] = {}
    for output in outputs:
        grouped.setdefault(output.index, []).append(output)
    return grouped


class ChatCompletion:
    """A request the engine has accepted; answer it with either `body` or `events`.

    Attributes:
        request: the validated request.
        id: of the answer.
        summary: what the access log says about it: counts, never contents.
    """

    def __init__(self, service: Service, text: TextModel, prepared: Prepared, generation: Generation) -> None:
        self.request = prepared.request
        self._prompt_tokens = len(prepared.prompt)
        self._media_tokens = prepared.media_tokens
        self._thinks = text.reasoning is not None
        self._generation = generation
        self._choices = [_Choice(index, prepared, text) for index in range(len(prepared.params))]
        self.id = "chatcmpl-" + secrets.token_hex(12)
        self._identity: dict[str, Any] = {
            "id": self.id,
            "created": int(time.time()),
            "model": service.config.model_name,
            "system_fingerprint": service.system_fingerprint,
        }

    @property
    def summary(self) -> str:
        return f"{self._prompt_tokens} tokens in, {sum(choice.tokens for choice in self._choices)} out"

    @property
    def finish_reasons(self) -> list[ChoiceFinish | None]:
        """Of the choices; None for one that has not ended."""
        return [choice.finish for choice in self._choices]

    def _usage(self) -> dict[str, Any]:
        produced = sum(choice.tokens for choice in self._choices)
        thought = sum(choice.reasoning_tokens for choice in self._choices) if self._thinks else None
        return stream.usage(self._prompt_tokens, produced, self._generation.cached_tokens, self._media_tokens, thought)

    @property
    def prompt_tokens(self) -> int:
        return self._prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """Final once something was received."""
        return self._generation.cached_tokens

    @property
    def reasoning_tokens(self) -> int:
        return sum(choice.reasoning_tokens for choice in self._choices)

    @property
    def new_call_id(self) -> Callable[[], str]:
        return self._choices[0].new_call_id

    async def receive(self) -> list[Event] | None:
        """What has come of the only choice since the last call; None once it has ended. In the place of `body` and `events`.

        Raises:
            InternalError, EngineUnavailable: the engine lost the request.
        """
        (choice,) = self._choices
        if choice.finish is not None or not (outputs := await self._generation.receive()):
            return None
        events = choice.push(outputs)
        if choice.stopped:
            self._generation.stop(0)
        return events

    @property
    def outcome(self) -> tuple[ChoiceFinish, str | None, int]:
        """Why the only choice has ended, the stop string that did it, and how many tokens it has."""
        (choice,) = self._choices
        assert choice.finish is not None, "it has not ended"
        return choice.finish, choice.stop_string, choice.tokens

    async def body(self) -> bytes:
        """The whole answer as JSON.

        Raises:
            InternalError, EngineUnavailable: the engine lost the request.
        """
        messages = [_Message() for _ in self._choices]
        while outputs := await self._generation.receive():
            for index, group in _by_choice(outputs).items():
                choice = self._choices[index]
                if choice.finish is None:
                    for event in choice.push(group):
                        messages[index].add(event, choice.new_call_id)
                    if choice.stopped:
                        self._generation.stop(index)
        choices = []
        for choice, message in zip(self._choices, messages, strict=True):
            assert choice.finish is not None, "the engine ended a choice without a reason"
            choices.append(message.choice(choice.index, choice.finish, choice.take_logprobs()))
        return stream.completion_body(choices=choices, usage=self._usage(), **self._identity)

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, everything that is ready in one piece.

        An engine's failure becomes an error event, and the stream then ends without `[DONE]`.
        """
        encoder = stream.ChunkEncoder(include_usage=self.request.include_usage, **self._identity)
        yield b"".join(encoder.role(choice.index) for choice in self._choices)
        try:
            while outputs := await self._generation.receive():
                if events := self._encode(encoder, outputs):
                    yield events
        except RequestError as error:
            yield stream.error_event(error)
            return
        yield (encoder.usage(self._usage()) if self.request.include_usage else b"") + stream.DONE

    def _encode(self, encoder: stream.ChunkEncoder, outputs: list[TokenOutput]) -> bytes:
        events = []
        for index, group in _by_choice(outputs).items():
            choice = self._choices[index]
            if choice.finish is not None:
                continue
            for event in choice.push(group):
                call_id = choice.new_call_id() if isinstance(event, CallBegin) else None
                events.append(encoder.event(index, event, call_id, choice.take_logprobs()))
            if choice.stopped:
                self._generation.stop(index)
            if choice.finish is not None:
                # Tokens whose text was never shown alone have their log-probabilities here.
                events.append(encoder.finish(index, choice.finish, choice.take_logprobs() or None))
        return b"".join(events)


async def start(
    service: Service,
    body: Buffer,
    stack: ExitStack,
    account: "MediaAccount | None" = None,
    *,
    read: Callable[[Service, Buffer], ChatCompletionRequest] = parse,
) -> ChatCompletion:
    """Hand a request to the engine. Returns once it is accepted, so that whatever refuses it still has a status to refuse with.

    Args:
        body: the HTTP request's body.
        stack: the request's life; its closing drops the request from the engine.
        account: pays for the body's bytes, if anything does.
        read: the chat in a body; raises RequestError.

    Raises:
        RequestError: any of the 400s, 404, 429, 503.
    """
    engine, text = service.require()
    size = len(body)

    begun = await service.off_the_loop(size, partial(_begin, service, engine, text, body, read))
    del body  # the request has its own copy of what it needs
    if isinstance(begun, Prepared):
        prepared = begun
        if account is not None:
            account.settle(0)
    else:
        request = begun
        seen = await _see(service, engine, request.media(), stack, account)
        request.drop_media()
        prepared = await service.off_the_loop(size, partial(prepare, engine, text, request, seen))
    constraint = prepared.answer.constraint
    grammar = None if constraint is None else await service.compile(constraint)
    generation = stack.enter_context(engine.submit(prepared.prompt, prepared.params, prepared.media, grammar))
    return ChatCompletion(service, text, prepared, generation)


def _begin(
    service: Service,
    engine: EngineAPI,
    text: TextModel,
    body: Buffer,
    read: Callable[[Service, Buffer], ChatCompletionRequest],
) -> ChatCompletionRequest | Prepared:
    """A request that is ready, or one whose media are still to be seen."""
    request = read(service, body)
    return request if request.has_media else prepare(engine, text, request)


async def _see(
    service: Service, engine: EngineAPI, media: "Sequence[MediumRequest]", stack: ExitStack, account: "MediaAccount | None"
) -> "list[Seen]":
    """Fetches and prepares a request's images and videos; the end of the request frees them."""
    if service.intake is None:
        raise InvalidRequest(
            f"this server's model sees no {media[0].kind}s; it takes text only",
            param=media[0].param,
            code="unsupported_parameter",
        )
    assert engine.info is not None, "an engine that is ready knows its model"
    if account is None:
        account = stack.enter_context(service.intake.budget.open())
    return await service.intake.take(media, account, max_tokens=engine.info.max_length)
