"""`/tokenize` and `/detokenize`: text or messages to token ids, and ids to text, exactly as a request's prompt is made."""

from functools import partial

from dashinfer.errors import InvalidRequest
from dashinfer.protocol import tokens as protocol
from dashinfer.protocol.parse import parse_request
from dashinfer.serving.room import check_characters
from dashinfer.serving.service import Service, TextModel


async def tokenize(service: Service, body: bytes | bytearray) -> bytes:
    """The answer to a `TokenizeRequest`. Raises RequestError."""
    return await service.off_the_loop(len(body), partial(_tokenize, service, body))


async def detokenize(service: Service, body: bytes | bytearray) -> bytes:
    """The answer to a `DetokenizeRequest`. Raises RequestError."""
    return await service.off_the_loop(len(body), partial(_detokenize, service, body))


def tokenizer_info(service: Service) -> bytes:
    """A `TokenizerInfo`. Raises EngineUnavailable."""
    engine, text = service.require()
    assert engine.info is not None, "an engine that is ready knows its model"
    return protocol.tokenizer_info_body(
        text.tokenizer.special_tokens, vocab_size=text.tokenizer.vocab_size, max_length=engine.info.max_length
    )


def _tokenize(service: Service, body: bytes | bytearray) -> bytes:
    engine, text = service.require()
    request = parse_request(protocol.TokenizeRequest, body)
    service.check_model(request.model)
    assert engine.info is not None, "an engine that is ready knows its model"
    prompt = _prompt(request, text)
    check_characters(prompt, engine.info.max_length, "messages" if request.prompt is None else "prompt")
    ids = text.tokenizer.encode(prompt, add_special_tokens=_adds_special(request))
    pieces = [text.tokenizer.token_piece(token) for token in ids] if request.return_token_strs else None
    return protocol.tokenize_body(ids, max_length=engine.info.max_length, token_strs=pieces)


def _prompt(request: protocol.TokenizeRequest, text: TextModel) -> str:
    if request.prompt is not None:
        return request.prompt
    return text.template.render(
        request.template_messages(),
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        kwargs=request.chat_template_kwargs,
    )


def _adds_special(request: protocol.TokenizeRequest) -> bool:
    """Templates write them themselves."""
    return request.prompt is not None if request.add_special_tokens is None else request.add_special_tokens


def _detokenize(service: Service, body: bytes | bytearray) -> bytes:
    engine, text = service.require()
    request = parse_request(protocol.DetokenizeRequest, body)
    service.check_model(request.model)
    assert engine.info is not None, "an engine that is ready knows its model"
    if request.tokens and (largest := max(request.tokens)) >= engine.info.vocab_size:
        raise InvalidRequest(f"`tokens` has the token {largest}; the last one is {engine.info.vocab_size - 1}", param="tokens")
    return protocol.detokenize_body(text.tokenizer.decode(request.tokens, skip_special_tokens=False))
