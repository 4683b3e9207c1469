"""One request for completions, from the body's bytes to the answer's: validate, tokenise, submit, detokenise, encode.

Each prompt is a request of its own to the engine. They compute together, as many as half of its queue holds and the key may
have at a time; their answers are sent one prompt after another. Counting is as in `choice`, but that log-probabilities include
the token that ended a choice, as evaluation harnesses expect, with its place at the end of the text.
"""

import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from dashinfer.engine.api import EngineAPI, Generation, TokenOutput
from dashinfer.errors import InvalidRequest, RequestError
from dashinfer.protocol import stream
from dashinfer.protocol.completions import CompletionEncoder, CompletionRequest, Prompt, choice
from dashinfer.protocol.parse import parse_request
from dashinfer.protocol.sampling import no_room, sampling_params
from dashinfer.serving.context import take_places
from dashinfer.serving.room import check_characters
from dashinfer.serving.service import Service, TextModel
from dashinfer.text.detokenizer import IncrementalDetokenizer, StopString
from dashinfer.text.tokenizer import Tokenizer
from dashinfer.types import FinishReason, SamplingParams, TokenLogprobs

MAX_PROMPT_LOGPROBS = 2**20  # of all prompts of a request together, each of about a hundred bytes until the answer is sent
_LEAST_LOGPROB = -9999.0  # stands for the logarithm of zero, which JSON cannot write


@dataclass(frozen=True)
class _Prepared:
    """A prompt that is ready for the engine; `text` is what it is echoed as."""

    tokens: list[int]
    text: str
    params: list[SamplingParams]


def _begin(service: Service, engine: EngineAPI, text: TextModel, body: bytes | bytearray) -> tuple[Any, list[_Prepared]]:
    """Everything before the engine; safe to run in a thread. Raises RequestError."""
    request = parse_request(CompletionRequest, body)
    service.check_model(request.model)
    prompts = [_prepare(engine, text, request, prompt) for prompt in request.prompt]
    if request.echo and request.logprobs is not None:
        wanted = sum(len(prompt.tokens) for prompt in prompts) * (request.logprobs + 1) * request.n
        if wanted > MAX_PROMPT_LOGPROBS:
            raise InvalidRequest(
                f"`logprobs` of all tokens of these prompts are {wanted}; a request may have {MAX_PROMPT_LOGPROBS}: "
                "send fewer prompts at once, or ask for fewer",
                param="logprobs",
            )
    return request, prompts


def _prepare(engine: EngineAPI, text: TextModel, request: CompletionRequest, prompt: Prompt) -> _Prepared:
    assert engine.info is not None, "an engine that is ready knows its model"
    tokens = prompt_tokens(engine, text, prompt, "prompt", add_special_tokens=request.add_special_tokens)
    echoed = prompt if isinstance(prompt, str) else ""
    if request.echo and not isinstance(prompt, str):
        echoed = text.tokenizer.decode(prompt, skip_special_tokens=False)
    params = sampling_params(
        request,
        generation_config=text.generation_config,
        eos_token_ids=text.tokenizer.eos_token_ids,
        vocab_size=engine.info.vocab_size,
        prompt_tokens=len(tokens),
        max_length=engine.info.max_length,
        new_seed=partial(secrets.randbits, 63),
    )
    if request.echo and request.logprobs is not None:
        params[0] = msgspec.structs.replace(params[0], prompt_logprobs=request.logprobs)  # the others' are the same
    return _Prepared(tokens, echoed, params)


def prompt_tokens(engine: EngineAPI, text: TextModel, prompt: Prompt, param: str, *, add_special_tokens: bool) -> list[int]:
    """Tokens that the engine takes, of a text or of what a client says are tokens, in the field `param`.

    Raises:
        InvalidRequest, ContextLengthExceeded: there is none, too many, or one that is no token.
    """
    assert engine.info is not None, "an engine that is ready knows its model"
    max_length, vocab_size = engine.info.max_length, engine.info.vocab_size
    if isinstance(prompt, str):
        check_characters(prompt, max_length, param)
        tokens = text.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    else:
        tokens = prompt
        if tokens and (max(tokens) >= vocab_size or min(tokens) < 0):
            raise InvalidRequest(f"`{param}` has a token that is none: they go from 0 to {vocab_size - 1}", param=param)
    if not tokens:
        raise InvalidRequest(f"`{param}` has no tokens", param=param)
    if len(tokens) >= max_length:
        raise no_room(max_length, f"{len(tokens)} tokens", param)
    return tokens


class _Logprobs:
    """The lists of a choice's tokens, in the order of the tokens."""

    def __init__(self, tokenizer: Tokenizer, *, offset: int, skip_special_tokens: bool) -> None:
        """`offset`: characters of the text before the first token."""
        self._tokenizer = tokenizer
        self._offset = offset
        self._text = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens, continues=offset > 0)
        self._clear()

    def _clear(self) -> None:
        self._lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token: int, logprobs: TokenLogprobs | None, *, most: int | None = None) -> None:
        """`logprobs`: None for a token that nothing comes before; `most`: the text ends there."""
        shown, _ = self._tokenizer.token_text(token)
        lists = self._lists
        lists["tokens"].append(shown)
        lists["text_offset"].append(self._offset if most is None else min(self._offset, most))
        self._offset += len(self._text.push([token]))
        if logprobs is None:
            lists["token_logprobs"].append(None)
            lists["top_logprobs"].append(None)
            return
        chosen = max(logprobs.chosen, _LEAST_LOGPROB)
        top: dict[str, float] = {}
        for other, value in zip(logprobs.top_tokens, logprobs.top_logprobs, strict=True):
            top.setdefault(self._tokenizer.token_text(other)[0], max(value, _LEAST_LOGPROB))
        top.setdefault(shown, chosen)
        lists["token_logprobs"].append(chosen)
        lists["top_logprobs"].append(top)

    def take(self) -> dict[str, list[Any]]:
        """The entries since the last call."""
        lists = self._lists
        self._clear()
        return lists


class _Choice:
    """One choice's way from tokens to text, which begins with the prompt if that is echoed."""

    def __init__(
        self, index: int, request: CompletionRequest, prepared: _Prepared, stop: Sequence[StopString], text: TextModel
    ):
        self.index = index
        self.tokens = 0
        self.finish: FinishReason | None = None
        self._request, self._prepared, self._tokenizer = request, prepared, text.tokenizer
        self._echo = request.echo
        self._logprobs: _Logprobs | None = None
        if request.logprobs is not None:
            offset = len(prepared.text) if request.echo else 0
            self._logprobs = _Logprobs(text.tokenizer, offset=offset, skip_special_tokens=request.skip_special_tokens)
        self._detokenizer = IncrementalDetokenizer(
            text.tokenizer, stop=stop, skip_special_tokens=request.skip_special_tokens, continues=True
        )

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended it, so that the engine does not know yet."""
        return self._detokenizer.stopped is not None

    def push(self, outputs: Sequence[TokenOutput]) -> str:
        """Text that can be shown now. Sets `finish` once the choice has ended."""
        shown = []
        for output in outputs:
            self.tokens += 1
            if output.finish != "stop":
                shown.append(self._detokenizer.push([output.token]))
                if self.stopped:
                    self.finish = "stop"
                    return "".join(shown)
            if self._logprobs is not None:
                assert output.logprobs is not None, "asked for and not delivered"
                self._logprobs.add(output.token, output.logprobs)
            if output.finish is not None:
                self.finish = output.finish
                shown.append(self._detokenizer.finish())
        return "".join(shown)

    def part(self, outputs: Sequence[TokenOutput], generation: Generation) -> dict[str, Any] | None:
        """What `outputs`, the next ones, add to the choice, as a CompletionChoice; None where there is nothing to show yet."""
        text, logprobs = "", None
        if self._echo:
            text, self._echo = self._prepared.text, False
            if self._logprobs is not None:
                logprobs = self._prompt_logprobs(generation)
        if self._request.max_tokens == 0:
            self.finish = "length"
        else:
            text += self.push(outputs)
            if self._logprobs is not None and (text or self.finish is not None):
                ours = self._logprobs.take()
                logprobs = ours if logprobs is None else {name: logprobs[name] + ours[name] for name in ours}
        if not text and self.finish is None and logprobs is None:
            return None
        return choice(self.index, text, self.finish, logprobs)

    def _prompt_logprobs(self, generation: Generation) -> dict[str, list[Any]]:
        tokens, echoed = self._prepared.tokens, self._prepared.text
        # What is special in the text was written there by the client, or else put around it.
        skips = self._tokenizer.decode(tokens, skip_special_tokens=False) != echoed
        entries = _Logprobs(self._tokenizer, offset=0, skip_special_tokens=skips)
        for token, logprobs in zip(tokens, [None, *generation.prompt_logprobs], strict=True):
            entries.add(token, logprobs, most=len(echoed))
        return entries.take()


class _Answer:
    """One prompt's generation and its choices."""

    def __init__(self, number: int, request: CompletionRequest, prepared: _Prepared, generation: Generation, text: TextModel):
        stop = [StopString(each) for each in request.stop]
        self.generation = generation
        self.prompt_tokens = len(prepared.tokens)
        self.choices = [
            _Choice(number * request.n + index, request, prepared, stop, text) for index in range(len(prepared.params))
        ]

    @property
    def produced(self) -> int:
        return sum(each.tokens for each in self.choices)

    async def receive(self) -> list[dict[str, Any]] | None:
        """What has come since the last call, as CompletionChoices; None once all have ended."""
        if not (outputs := await self.generation.receive()):
            return None
        found = []
        for index in dict.fromkeys(output.index for output in outputs):
            one = self.choices[index]
            if one.finish is not None:
                continue
            if (part := one.part([output for output in outputs if output.index == index], self.generation)) is not None:
                found.append(part)
            if one.stopped:
                self.generation.stop(index)
        return found


class Completions:
    """A request the engine has accepted; answer it with either `body` or `events`.

    Attributes:
        request: the validated request.
        id: of the answer.
    """

    def __init__(
        self,
        service: Service,
        text: TextModel,
        request: CompletionRequest,
        prompts: Sequence[_Prepared],
        submit: Callable[[_Prepared], Generation],
        together: int,
    ) -> None:
        """Hands over the first `together` prompts by `submit`; raises what that raises."""
        self.request = request
        self._text = text
        self._submit = submit
        self._waiting = deque(enumerate(prompts))
        self._answers: list[_Answer] = []  # of the prompts that were handed over
        self.id = "cmpl-" + secrets.token_hex(12)
        self._encoder = CompletionEncoder(
            id=self.id,
            created=int(time.time()),
            model=service.config.model_name,
            system_fingerprint=service.system_fingerprint,
            include_usage=request.include_usage,
        )
        while self._waiting and len(self._answers) < together:
            self._hand_over()

    def _hand_over(self) -> None:
        number, prepared = self._waiting.popleft()
        self._answers.append(_Answer(number, self.request, prepared, self._submit(prepared), self._text))

    def _in_order(self) -> Iterator[_Answer]:
        """The answers, each to be received to its end; the next prompt is handed over then."""
        for answer in self._answers:  # which grows
            yield answer
            if self._waiting:
                self._hand_over()

    @property
    def summary(self) -> str:
        """What the access log says about it: counts, never contents."""
        prompts = sum(answer.prompt_tokens for answer in self._answers)
        return f"{prompts} tokens in, {sum(answer.produced for answer in self._answers)} out"

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """Of the choices of prompts that were handed over; None for one that has not ended."""
        return [choice.finish for answer in self._answers for choice in answer.choices]

    def _usage(self) -> dict[str, Any]:
        return stream.usage(
            sum(answer.prompt_tokens for answer in self._answers),
            sum(answer.produced for answer in self._answers),
            sum(answer.generation.cached_tokens for answer in self._answers),
        )

    async def body(self) -> bytes:
        """The whole answer as JSON.

        Raises:
            InternalError, EngineUnavailable: the engine lost it.
            QueueFull: other requests have taken the places of prompts that were still to come.
        """
        choices: dict[int, list[dict[str, Any]]] = {}
        for answer in self._in_order():
            while (parts := await answer.receive()) is not None:
                for part in parts:
                    choices.setdefault(part["index"], []).append(part)
        return self._encoder.body([_joined(choices[index]) for index in sorted(choices)], self._usage())

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events. An engine's failure becomes an error event, without `[DONE]` after it."""
        try:
            for answer in self._in_order():
                while (parts := await answer.receive()) is not None:
                    if parts:
                        yield b"".join([self._encoder.chunk(part) for part in parts])
        except RequestError as error:
            yield stream.error_event(error)
            return
        yield (self._encoder.usage(self._usage()) if self.request.include_usage else b"") + stream.DONE


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One choice of its parts."""
    lists = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    logprobs = {name: [value for each in lists for value in each[name]] for name in lists[0]} if lists else None
    return choice(parts[0]["index"], "".join([part["text"] for part in parts]), parts[-1]["finish_reason"], logprobs)


async def start(service: Service, body: bytes | bytearray, stack: ExitStack) -> Completions:
    """Hand a request to the engine; as `chat.start`. Raises RequestError."""
    engine, text = service.require()
    size = len(body)
    request, prompts = await service.off_the_loop(size, partial(_begin, service, engine, text, body))
    most = min(len(prompts), max(1, service.config.max_queue // 2))  # more would take the whole queue, or not fit into it
    together = take_places(request.n, most * request.n) // request.n
    constraint = request.constraint()
    grammar = None if constraint is None else await service.compile(constraint)

    def submit(prepared: _Prepared) -> Generation:
        return stack.enter_context(engine.submit(prepared.tokens, prepared.params, None, grammar))

    return Completions(service, text, request, prompts, submit, together)
