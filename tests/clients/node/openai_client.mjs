// OpenAI's package for Node, used as its documentation shows it, one function a use.
//
//     node openai_client.mjs URL KEY [more]
//
// prints a JSON object with an entry a function, as programs/uses.py says.

import OpenAI, { APIUserAbortError, toFile } from "openai";
import { zodResponseFormat, zodTextFormat, zodFunction } from "openai/helpers/zod";
import { z } from "zod";

const [url, key, which] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const model = "demo";
const messages = [{ role: "user", content: "What is the capital of France?" }];
const chat = { model, messages, temperature: 0, max_tokens: 40 };
const Person = z.object({ name: z.string().max(20), age: z.number().int().min(1).max(99), mood: z.enum(["happy", "sad"]) });
const Weather = z.object({ city: z.enum(["Paris", "Rome"]), days: z.number().int().min(1).max(9) });
const invent = { ...chat, messages: [{ role: "user", content: "Invent a person." }], max_tokens: 100 };

async function refusal(promise) {
  try {
    await promise;
  } catch (error) {
    return { class: error.constructor.name, status: error.status, code: error.code, param: error.param, id: typeof error.requestID };
  }
  throw new Error("was not refused");
}

const uses = {
  async models() {
    const found = [];
    for await (const each of client.models.list()) found.push(each.id);
    return [found, (await client.models.retrieve(model)).id];
  },

  async whole() {
    const { data, response } = await client.chat.completions.create(chat).withResponse();
    const { choices, usage } = data;
    return {
      text: choices[0].message.content,
      finish: choices[0].finish_reason,
      adds_up: usage.prompt_tokens + usage.completion_tokens === usage.total_tokens,
      same_id: data._request_id === response.headers.get("x-request-id"),
    };
  },

  async streamed() {
    const stream = await client.chat.completions.create({ ...chat, stream: true, stream_options: { include_usage: true } });
    let text = "", usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    const whole = await client.chat.completions.create(chat);
    return { text, same: text === whole.choices[0].message.content, tokens: usage.completion_tokens === whole.usage.completion_tokens };
  },

  async named_tool() {
    const tools = [zodFunction({ name: "weather", parameters: Weather, description: "The weather of a city" })];
    const choice = { type: "function", function: { name: "weather" } };
    const found = await client.chat.completions.parse({ ...chat, tools, tool_choice: choice });
    const { message, finish_reason } = found.choices[0];
    const call = message.tool_calls[0];
    const result = { role: "tool", tool_call_id: call.id, content: "mild" };
    const after = await client.chat.completions.create({ ...chat, tools, tool_choice: "none", messages: [...messages, message, result] });
    return { args: call.function.parsed_arguments, finish: finish_reason, after: after.choices[0].message.tool_calls ?? null };
  },

  async structured() {
    const found = await client.chat.completions.parse({ ...invent, response_format: zodResponseFormat(Person, "person") });
    const schema = { type: "object", properties: { age: { type: "integer", maximum: 9 } }, required: ["age"], additionalProperties: false };
    const format = { type: "json_schema", json_schema: { name: "aged", strict: true, schema } };
    const raw = await client.chat.completions.create({ ...invent, response_format: format });
    return [Person.safeParse(found.choices[0].message.parsed).success, typeof JSON.parse(raw.choices[0].message.content).age];
  },

  async aborted() {
    const long = { ...chat, max_tokens: 240, stream: true, ignore_eos: true };
    const stream = await client.chat.completions.create(long);
    let chunks = 0;
    for await (const _ of stream) if (++chunks === 3) break; // which ends the request
    const controller = new AbortController();
    const other = client.chat.completions.create({ ...long, stream: false }, { signal: controller.signal });
    setTimeout(() => controller.abort(), 100);
    const aborted = await other.then(() => false, (error) => error instanceof APIUserAbortError);
    const helper = client.chat.completions.stream(long);
    helper.once("content", () => helper.abort());
    return { chunks, aborted, helper: await helper.done().then(() => false, (error) => error instanceof APIUserAbortError) };
  },

  async errors() {
    const wrong = new OpenAI({ baseURL: `${url}/v1`, apiKey: "sk-wrong", maxRetries: 0 });
    return {
      key: await refusal(wrong.models.list()),
      value: await refusal(client.chat.completions.create({ ...chat, temperature: 9 })),
      streamed: await refusal(client.chat.completions.create({ ...chat, temperature: 9, stream: true })),
      model: await refusal(client.chat.completions.create({ ...chat, model: "other" })),
      long: await refusal(client.chat.completions.create({ ...chat, messages: [{ role: "user", content: "word ".repeat(9000) }] })),
      route: await refusal(client.images.generate({ model, prompt: "a cat" })),
      file: await refusal(client.files.create({ file: await toFile(Buffer.from("{}"), "x.jsonl"), purpose: "batch" })),
    };
  },

  async embeddings() {
    const input = ["a cat", "a dog"];
    const [packed, plain] = [
      await client.embeddings.create({ model, input }), // which asks for base64
      await client.embeddings.create({ model, input, encoding_format: "float" }),
    ];
    const far = Math.max(...packed.data[1].embedding.map((value, i) => Math.abs(value - plain.data[1].embedding[i])));
    return [packed.data.length, packed.data[0].embedding.length, far < 1e-6];
  },

  async responses() {
    const asked = { model, input: messages[0].content, temperature: 0, max_output_tokens: 40 };
    const whole = await client.responses.create(asked);
    const stream = client.responses.stream(asked);
    const types = [];
    let text = "";
    for await (const event of stream) {
      if (types.at(-1) !== event.type) types.push(event.type);
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    const final = await stream.finalResponse();
    const next = await client.responses.create({ ...asked, input: "And of Italy?", previous_response_id: final.id });
    const items = [];
    for await (const item of client.responses.inputItems.list(next.id)) items.push(item.role ?? item.type);
    const kept = await client.responses.retrieve(whole.id);
    await client.responses.delete(whole.id);
    return {
      same: [whole.output_text, final.output_text, kept.output_text].every((each) => each === text),
      text, types, items,
      gone: (await refusal(client.responses.retrieve(whole.id))).class,
      cancel: (await refusal(client.responses.cancel(next.id))).class,
    };
  },
};

const more = {
  async helper_streamed() {
    const stream = client.chat.completions.stream({ ...chat, logprobs: true });
    const kinds = new Set();
    for (const kind of ["content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done", "error"])
      stream.on(kind, () => kinds.add(kind));
    return [(await stream.finalContent()), [...kinds].sort()];
  },

  async choices() {
    const found = await client.chat.completions.create({ ...chat, n: 3, temperature: 1, seed: 1, max_tokens: 4, stop: ["\n\n"] });
    return found.choices.map((choice) => choice.index);
  },

  async named_tool_streamed() {
    const tools = [zodFunction({ name: "weather", parameters: Weather })];
    const stream = client.chat.completions.stream({ ...chat, tools, tool_choice: { type: "function", function: { name: "weather" } } });
    let pieces = 0;
    stream.on("tool_calls.function.arguments.delta", () => pieces++);
    const final = await stream.finalChatCompletion();
    return { args: final.choices[0].message.tool_calls[0].function.parsed_arguments, several: pieces > 1 };
  },

  async run_tools() {
    const given = [];
    const tool = zodFunction({ name: "weather", parameters: Weather, function: (args) => (given.push(args), "mild") });
    const runner = client.chat.completions.runTools({ ...chat, tools: [tool], tool_choice: { type: "function", function: { name: "weather" } } });
    await runner.finalChatCompletion();
    return [given.length, Weather.safeParse(given[0]).success, runner.messages.map((message) => message.role)];
  },

  async completion() {
    const found = await client.completions.create({ model, prompt: "The capital of France is", temperature: 0, max_tokens: 5, logprobs: 1 });
    return [found.choices[0].text, found.choices[0].logprobs.tokens.length];
  },

  async responses_structured() {
    const asked = { model, input: "Invent a person.", temperature: 0, max_output_tokens: 100 };
    const found = await client.responses.parse({ ...asked, text: { format: zodTextFormat(Person, "person") } });
    return Person.safeParse(found.output_parsed).success;
  },
};

const results = {};
for (const [name, use] of Object.entries(which ? more : uses)) {
  try {
    results[name] = { got: await use() };
  } catch (error) {
    results[name] = { failed: error.stack ?? String(error) };
  }
}
console.log("\n" + JSON.stringify(results));
