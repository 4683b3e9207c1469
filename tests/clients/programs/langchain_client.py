"""LangChain's OpenAI and Anthropic packages."""

from typing import Any, Literal

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field
from uses import KEY, MODEL, QUESTION, URL, error, main, more, use

OPENAI: dict[str, Any] = {"model": MODEL, "base_url": f"{URL}/v1", "api_key": KEY, "max_retries": 0}
CHAT: dict[str, Any] = {**OPENAI, "temperature": 0, "max_tokens": 40}

chat = ChatOpenAI(**CHAT, stream_usage=True)
responses = ChatOpenAI(**CHAT, use_responses_api=True)
claude = ChatAnthropic(model=MODEL, base_url=URL, api_key=KEY, temperature=0, max_tokens=40, max_retries=0)


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=1, le=99)
    mood: Literal["happy", "sad"]


@tool
def weather(city: Literal["Paris", "Rome"], days: Literal[1, 2, 3]) -> str:
    """The weather of a city."""
    return f"{days} mild days in {city}"


@use
def invoke() -> Any:
    answer = chat.invoke([SystemMessage("You are a helpful assistant."), HumanMessage(QUESTION)])
    return answer.text, answer.usage_metadata, answer.response_metadata["finish_reason"]


@use
def stream() -> Any:
    chunks = list(chat.stream(QUESTION))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return len(chunks), whole.text, whole.usage_metadata, chat.invoke(QUESTION).text


@more
def chain() -> str:
    prompt = ChatPromptTemplate.from_messages([("system", "You are a helpful assistant."), ("human", "{question}")])
    return (prompt | chat | StrOutputParser()).invoke({"question": QUESTION})


@more
def batch() -> Any:
    questions = [QUESTION, "What is the capital of Italy?", "Say hello."]
    return [answer.text for answer in chat.batch(questions)], chat.invoke(questions[1]).text


@use
async def asynchronous() -> Any:
    return (await chat.ainvoke(QUESTION)).text, "".join([chunk.text async for chunk in chat.astream(QUESTION)])


@use
def structured() -> Any:
    return ChatOpenAI(**CHAT | {"max_tokens": 60}).with_structured_output(Person).invoke("Invent one.").model_dump()


@more
def structured_by_function() -> Any:
    longer = ChatOpenAI(**CHAT | {"max_tokens": 60})
    return longer.with_structured_output(Person, method="function_calling").invoke("Invent one.").model_dump()


@more
def json_mode() -> Any:
    return chat.with_structured_output(method="json_mode", include_raw=True).invoke("As JSON: hi")["raw"].text[:1]


@use
def tools() -> Any:
    bound = chat.bind_tools([weather], tool_choice="weather")
    question = HumanMessage("How is the weather in Rome?")
    called = bound.invoke([question])
    (call,) = called.tool_calls
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    after = chat.bind_tools([weather], tool_choice="none").invoke([question, called, result])
    return call["args"], result.content, called.response_metadata["finish_reason"], after.text, after.tool_calls


@more
def tools_streamed() -> Any:
    whole = None
    for chunk in chat.bind_tools([weather], tool_choice="required", strict=True).stream("How is the weather in Rome?"):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    return [[call["name"], call["args"]] for call in whole.tool_calls]


@more
def logprobs() -> Any:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    entries = answer.response_metadata["logprobs"]["content"]
    return answer.text, "".join(entry["token"] for entry in entries), {len(entry["top_logprobs"]) for entry in entries} == {2}


@use
def responses_api() -> Any:
    whole = responses.invoke(QUESTION)
    streamed = "".join(chunk.text for chunk in responses.stream(QUESTION))
    next_turn = responses.invoke("And of Italy?", previous_response_id=whole.response_metadata["id"])
    return whole.text, streamed, whole.usage_metadata, next_turn.usage_metadata


@more
def responses_api_structured() -> Any:
    longer = ChatOpenAI(**CHAT | {"max_tokens": 60}, use_responses_api=True)
    return longer.with_structured_output(Person).invoke("Invent one.").model_dump()


@more
def responses_api_tools() -> Any:
    return responses.bind_tools([weather], tool_choice="weather").invoke("How is the weather in Rome?").tool_calls[0]["args"]


@more
def completion() -> str:
    return OpenAI(**OPENAI, temperature=0, max_tokens=5).invoke("The capital of France is")


@use
def embeddings() -> Any:
    model = OpenAIEmbeddings(**OPENAI, check_embedding_ctx_length=False)
    texts = ["a cat", "a kitten", "the stock market fell"]
    vectors = model.embed_documents(texts)
    return len(vectors[0]), max(abs(a - b) for a, b in zip(model.embed_query(texts[0]), vectors[0], strict=True))


@use
def errors() -> Any:
    question = [HumanMessage(QUESTION)]
    return {
        "model": error(ChatOpenAI(**CHAT | {"model": "other"}).invoke, question),
        "key": error(ChatOpenAI(**CHAT | {"api_key": "sk-wrong"}).invoke, question),
        "value": error(ChatOpenAI(**CHAT | {"temperature": 9}).invoke, question),
        "long": error(chat.invoke, "word " * 9000),
    }


@use
def anthropic() -> Any:
    whole = claude.invoke([SystemMessage("You are a helpful assistant."), HumanMessage(QUESTION)])
    streamed = "".join(
        chunk.text for chunk in claude.stream([SystemMessage("You are a helpful assistant."), HumanMessage(QUESTION)])
    )
    return whole.text, streamed, whole.usage_metadata


@more
def anthropic_tools() -> Any:
    return claude.bind_tools([weather], tool_choice="weather").invoke("How is the weather in Rome?").tool_calls[0]["args"]


@more
def anthropic_structured() -> Any:
    longer = ChatAnthropic(model=MODEL, base_url=URL, api_key=KEY, temperature=0, max_tokens=60, max_retries=0)
    return longer.with_structured_output(Person).invoke("Invent one.").model_dump()


if __name__ == "__main__":
    main()
