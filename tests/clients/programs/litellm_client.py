"""LiteLLM, which speaks for many applications."""

from typing import Any, Literal

import litellm
from pydantic import BaseModel, Field
from uses import KEY, MODEL, QUESTION, URL, WEATHER, error, main, more, use

litellm.telemetry = False
MESSAGES = [{"role": "user", "content": QUESTION}]
OPENAI: dict[str, Any] = {"api_base": f"{URL}/v1", "api_key": KEY, "max_retries": 0}
CHAT: dict[str, Any] = {**OPENAI, "messages": MESSAGES, "temperature": 0, "max_tokens": 40}


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=1, le=99)
    mood: Literal["happy", "sad"]


def _streamed(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def _both_ways(model: str) -> Any:
    whole = litellm.completion(model, **CHAT)
    chunks = list(litellm.completion(model, **CHAT, stream=True, stream_options={"include_usage": True}))
    rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    return {
        "whole": whole.choices[0].message.content,
        "streamed": _streamed(chunks),
        "rebuilt": rebuilt.choices[0].message.content,
        "finish": [whole.choices[0].finish_reason, rebuilt.choices[0].finish_reason],
        "usage": [[each.usage.prompt_tokens, each.usage.completion_tokens] for each in (whole, rebuilt)],
    }


@use
def openai() -> Any:
    return _both_ways(f"openai/{MODEL}")


@more
def hosted_vllm() -> Any:
    return _both_ways(f"hosted_vllm/{MODEL}")


@use
async def asynchronous() -> Any:
    whole = await litellm.acompletion(f"openai/{MODEL}", **CHAT)
    stream = await litellm.acompletion(f"hosted_vllm/{MODEL}", **CHAT, stream=True)
    return whole.choices[0].message.content, _streamed([chunk async for chunk in stream])


@more
def batch() -> list[str]:
    conversations = [MESSAGES, [{"role": "user", "content": "Say hello."}]]
    rest = {name: value for name, value in CHAT.items() if name != "messages"}
    found = litellm.batch_completion(f"openai/{MODEL}", messages=conversations, **rest)
    return [answer.choices[0].message.content for answer in found]


@use
def tools() -> Any:
    asked = {**CHAT, "tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    whole = litellm.completion(f"hosted_vllm/{MODEL}", **asked)
    rebuilt = litellm.stream_chunk_builder(list(litellm.completion(f"openai/{MODEL}", **asked, stream=True)))
    message = whole.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "mild"}
    after = litellm.completion(f"openai/{MODEL}", **CHAT | {"messages": [*MESSAGES, message, result], "tools": [WEATHER]})
    calls = [each.choices[0].message.tool_calls[0].function for each in (whole, rebuilt)]
    return [[call.name, call.arguments] for call in calls], whole.choices[0].finish_reason, after.choices[0].finish_reason


@more
def structured() -> list[Any]:
    asked = {**CHAT, "response_format": Person, "max_tokens": 60}
    texts = [litellm.completion(f"{kind}/{MODEL}", **asked).choices[0].message.content for kind in ("openai", "hosted_vllm")]
    return [Person.model_validate_json(text).model_dump() for text in texts]


@more
def text_completion() -> Any:
    asked = {**OPENAI, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 5}
    whole = litellm.text_completion(model=f"text-completion-openai/{MODEL}", **asked, logprobs=1)
    return whole.choices[0].text, len(whole.choices[0].logprobs.tokens)


@more
def embedding() -> Any:
    found = [litellm.embedding(f"{kind}/{MODEL}", input=["a cat", "a dog"], **OPENAI) for kind in ("openai", "hosted_vllm")]
    return [[len(entry["embedding"]) for entry in each.data] for each in found]


@use
def responses() -> Any:
    asked = {**OPENAI, "input": QUESTION, "temperature": 0, "max_output_tokens": 40}
    whole = litellm.responses(model=f"openai/{MODEL}", **asked)
    stream = litellm.responses(model=f"openai/{MODEL}", **asked, stream=True)
    events = [str(getattr(event.type, "value", event.type)) for event in stream]
    return whole.output[0].content[0].text, events[0], events[-1]


@more
def anthropic() -> Any:
    asked = {"api_base": URL, "api_key": KEY, "messages": MESSAGES, "temperature": 0, "max_tokens": 40}
    whole = litellm.completion(f"anthropic/{MODEL}", **asked)
    return whole.choices[0].message.content, _streamed(list(litellm.completion(f"anthropic/{MODEL}", **asked, stream=True)))


@use
def errors() -> Any:
    def ask(model: str = f"openai/{MODEL}", **changes: Any) -> list[Any]:
        return error(litellm.completion, model, **CHAT | changes)

    return {
        "model": ask("openai/other"),
        "key": ask(api_key="sk-wrong"),
        "value": ask(temperature=9),
        "long": ask(messages=[{"role": "user", "content": "word " * 9000}]),
        "vllm model": ask("hosted_vllm/other"),
        "vllm long": ask(f"hosted_vllm/{MODEL}", messages=[{"role": "user", "content": "word " * 9000}]),
    }


if __name__ == "__main__":
    main()
