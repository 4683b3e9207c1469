"""One chat completion, from the body's bytes to the answer's: validate, see, render, tokenise, submit, detokenise, encode.

Knows nothing of routes, headers and connections. A request's life in the engine is the `with` block it was entered into: the
caller's exit stack, which is closed when the HTTP request ends for any reason, or what goes on in the background does.
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
from dashinfer.protocol.sampling import sampling_params
from dashinfer.serving.answers import AnswerPlan, plan_answer, template_kwargs
from dashinfer.serving.choice import Choice, Message, by_choice
from dashinfer.serving.context import take_places
from dashinfer.serving.room import check_characters
from dashinfer.serving.service import Service, TextModel
from dashinfer.text.detokenizer import StopString
from dashinfer.text.tools.events import CallBegin, Event
from dashinfer.types import SamplingParams

if TYPE_CHECKING:
    from dashinfer.vision.budget import MediaAccount
    from dashinfer.vision.intake import Seen
    from dashinfer.vision.request import MediumRequest

Buffer = bytes | bytearray


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
    rendered = _render(text, request, max_length)
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


def _render(text: TextModel, request: ChatCompletionRequest, max_length: int) -> str:
    rendered = text.template.render(
        request.template_messages(),
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        kwargs=template_kwargs(request, text),
        tools=request.template_tools(),
    )
    check_characters(rendered, max_length, "messages")
    return rendered


def count_tokens(engine: EngineAPI, text: TextModel, request: ChatCompletionRequest) -> int:
    """Tokens of the prompt of a request that has no media, whether they fit into the context or not.

    Raises:
        InvalidRequest, ContextLengthExceeded: the request is at fault, or so long that it is not tokenised.
    """
    assert engine.info is not None, "an engine that is ready knows its model"
    rendered = _render(text, request, engine.info.max_length)
    plan_answer(request, text, rendered)
    if text.vision is None:
        return len(text.tokenizer.encode(rendered, add_special_tokens=False))
    from dashinfer.vision.prompt import lay_out

    return len(lay_out(rendered, (), text.vision, text.tokenizer).tokens)


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
        self._choices = [
            Choice(index, prepared.request, prepared.answer, prepared.stop, text) for index in range(len(prepared.params))
        ]
        self.id = "chatcmpl-" + secrets.token_hex(12)
        self._identity: dict[str, Any] = {
            "id": self.id,
            "created": int(time.time()),
            "model": service.config.model_name,
            "system_fingerprint": service.system_fingerprint,
        }

    @property
    def summary(self) -> str:
        return f"{self._prompt_tokens} tokens in, {self.tokens} out"

    @property
    def finish_reasons(self) -> list[ChoiceFinish | None]:
        """Of the choices; None for one that has not ended."""
        return [choice.finish for choice in self._choices]

    def _usage(self) -> dict[str, Any]:
        thought = sum(choice.reasoning_tokens for choice in self._choices) if self._thinks else None
        return stream.usage(self._prompt_tokens, self.tokens, self._generation.cached_tokens, self._media_tokens, thought)

    @property
    def begun(self) -> bool:
        """Some of it was computed."""
        return self._generation.queue_time is not None

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

    @property
    def tokens(self) -> int:
        """That the answer has so far."""
        return sum(choice.tokens for choice in self._choices)

    async def body(self) -> bytes:
        """The whole answer as JSON.

        Raises:
            InternalError, EngineUnavailable: the engine lost the request.
        """
        messages = [Message() for _ in self._choices]
        while outputs := await self._generation.receive():
            for index, group in by_choice(outputs).items():
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
        for index, group in by_choice(outputs).items():
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
    size: int | None = None,
) -> ChatCompletion:
    """Hand a request to the engine. Returns once it is accepted, so that whatever refuses it still has a status to refuse with.

    Args:
        body: the HTTP request's body.
        stack: the request's life; its closing drops the request from the engine.
        account: pays for the body's bytes, if anything does.
        read: the chat in a body; raises RequestError.
        size: bytes of what the chat is made of, where that is more than the body.

    Raises:
        RequestError: any of the 400s, 404, 429, 503.
    """
    engine, text = service.require()
    size = len(body) if size is None else size

    begun = await service.off_the_loop(size, partial(_begin, service, engine, text, body, read))
    del body  # the request has its own copy of what it needs
    choices = (begun.request if isinstance(begun, Prepared) else begun).n
    take_places(choices, choices)
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
