// The conversation lives in this page alone. What comes from the model or the server is only ever set as textContent.

import { readEvents } from "./sse.js";

const HEALTH_INTERVAL = 2000; // ms between looks at a server that is not ready
const SETTINGS = ["temperature", "max-tokens", "api-key", "system"]; // ids; kept while the tab is open

const at = (id) => document.getElementById(id);
const [turns, status, prompt, images, stop, send] = ["turns", "status", "prompt", "images", "stop", "send"].map(at);

let conversation = []; // messages of finished turns
let attached = []; // data: addresses
let model = null;
let running = null; // AbortController of the request in flight

class ServerError extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

function add(parent, tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  parent.append(element);
  return element;
}

// Changes what is shown, and keeps the end in sight for who was there.
function show(change) {
  const atEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 40;
  change();
  if (atEnd) turns.scrollTop = turns.scrollHeight;
}

function headers() {
  const key = at("api-key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

async function call(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers(), cache: "no-store" });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new ServerError(body?.error?.message ?? `the server answered ${answer.status}`, answer.status);
}

async function findModel(signal) {
  if (model === null) {
    model = (await (await call("v1/models", { signal })).json()).data[0].id;
    at("model").textContent = model;
    document.title = `${model} - DashInfer chat`;
  }
  return model;
}

async function watchHealth() {
  let state = null;
  try {
    state = await (await fetch("health", { cache: "no-store" })).json();
  } catch {
    // Said below.
  }
  if (state?.status === "ok") {
    status.textContent = "";
    at("attach").hidden = state.mode !== "vlm";
    findModel().catch(() => {}); // it may need a key, which is asked for with the first message
    return;
  }
  status.textContent = state ? `The server is ${state.status}.` : "The server cannot be reached.";
  setTimeout(watchHealth, HEALTH_INTERVAL);
}

// Images

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function attach(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    try {
      attached.push(await readFile(file));
    } catch (error) {
      status.textContent = `${file.name} cannot be read: ${error.message}`;
    }
  }
  showAttached();
}

function showAttached() {
  images.replaceChildren();
  images.hidden = attached.length === 0;
  attached.forEach((address, number) => {
    const button = add(add(images, "li"), "button");
    button.type = "button";
    button.setAttribute("aria-label", `Remove image ${number + 1}`);
    button.title = "Remove";
    const picture = add(button, "img");
    picture.src = address;
    picture.alt = "";
    button.addEventListener("click", () => {
      attached.splice(number, 1);
      showAttached();
      prompt.focus();
    });
  });
}

// Turns

function showUser(text, pictures) {
  const turn = add(turns, "article", "turn user");
  turn.setAttribute("aria-label", "You");
  if (pictures.length) {
    const row = add(turn, "div", "pictures");
    pictures.forEach((address, number) => {
      const picture = add(row, "img");
      picture.src = address;
      picture.alt = `Image ${number + 1}`;
    });
  }
  if (text) add(turn, "div", "text", text);
  turns.scrollTop = turns.scrollHeight;
}

class AnswerView {
  constructor() {
    this.turn = add(turns, "article", "turn assistant");
    this.turn.setAttribute("aria-label", "Answer");
    this.body = add(this.turn, "div", "text");
    this.figures = add(this.turn, "p", "figures", "…");
    this.thinking = null;
    turns.scrollTop = turns.scrollHeight;
  }

  // Appending a node an event keeps long answers cheap: nothing that is there already is written again.
  append(text) {
    this.body.append(text);
  }

  appendThinking(text) {
    if (this.thinking === null) {
      const details = document.createElement("details");
      add(details, "summary", "", "Thinking");
      this.thinking = add(details, "div", "text");
      this.turn.insertBefore(details, this.body);
    }
    this.thinking.append(text);
  }

  fail(message) {
    add(this.turn, "p", "error", message).setAttribute("role", "alert");
  }
}

// Tokens/s are counted from the first token on; until the server has said how many there were, an event counts as one.
class Pace {
  constructor() {
    this.sent = performance.now();
    this.first = this.last = null;
    this.events = 0;
    this.tokens = null;
  }

  event() {
    this.last = performance.now();
    this.first ??= this.last;
    this.events += 1;
  }

  toString() {
    if (this.first === null) return "";
    const [count, about] = this.tokens === null ? [this.events, "about "] : [this.tokens, ""];
    const seconds = (this.last - this.first) / 1000;
    const rate = count > 1 && seconds > 0 ? `, ${about}${((count - 1) / seconds).toFixed(1)} tokens/s` : "";
    return `${about}${count} tokens${rate}, first after ${((this.first - this.sent) / 1000).toFixed(2)} s`;
  }
}

function requestBody(messages) {
  const system = at("system").value.trim();
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  return {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: number("temperature"),
    max_tokens: number("max-tokens"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

function userMessage(text, pictures) {
  if (!pictures.length) return { role: "user", content: text };
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role: "user", content: text ? [...parts, { type: "text", text }] : parts };
}

// Fills the view. Returns the answer's text and why it ended.
async function streamAnswer(messages, view, answer, signal) {
  await findModel(signal);
  const pace = new Pace();
  let end = null;
  let shown = 0;
  const body = JSON.stringify(requestBody(messages));
  const response = await call("v1/chat/completions", { method: "POST", body, signal });
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, chunk.error.code);
    if (chunk.usage) pace.tokens = chunk.usage.completion_tokens;
    const choice = chunk.choices[0];
    const content = choice?.delta?.content;
    const thinking = choice?.delta?.reasoning_content;
    end = choice?.finish_reason ?? end;
    if (content || thinking) pace.event();
    answer.text += content ?? "";
    show(() => {
      if (thinking) view.appendThinking(thinking);
      if (content) view.append(content);
      if (pace.tokens !== null || performance.now() - shown > 200) {
        view.figures.textContent = String(pace);
        shown = performance.now();
      }
    });
  }
  if (end === null) throw new ServerError("the answer ended early");
  const cut = end === "length" ? "; cut short by the limit of tokens" : "";
  view.figures.textContent = `${pace}${cut}`;
}

function setRunning(controller) {
  running = controller;
  const busy = controller !== null;
  stop.hidden = !busy;
  send.hidden = busy;
  turns.setAttribute("aria-busy", String(busy));
}

async function ask() {
  const text = prompt.value.trim();
  if (running || (!text && !attached.length)) return;
  const wrong = ["temperature", "max-tokens"].map(at).find((input) => !input.checkValidity());
  if (wrong) {
    openSettings(true);
    wrong.reportValidity();
    return;
  }
  const controller = new AbortController();
  setRunning(controller);
  status.textContent = "";
  const pictures = attached;
  attached = [];
  prompt.value = "";
  showAttached();
  showUser(text, pictures);
  const message = userMessage(text, pictures);
  const view = new AnswerView();
  const answer = { text: "" };
  const before = conversation;
  try {
    await streamAnswer([...before, message], view, answer, controller.signal);
  } catch (error) {
    const known = view.figures.textContent.replace("…", "");
    if (controller.signal.aborted) {
      view.figures.textContent = known ? `${known}; stopped` : "stopped";
    } else {
      view.figures.textContent = known;
      view.fail(error instanceof ServerError ? error.message : `The server cannot be reached: ${error.message}`);
      answer.text = "";
      model = null; // the server may be another by now
      if (error.code === 401) askForKey();
    }
  }
  if (running !== controller) return; // another chat has begun
  setRunning(null);
  if (answer.text) {
    conversation = [...before, message, { role: "assistant", content: answer.text }];
  } else {
    prompt.value ||= text; // to be sent again, as it is no part of the conversation
    if (!attached.length) attached = pictures;
    showAttached();
  }
}

// Settings

function openSettings(open) {
  at("settings").hidden = !open;
  at("open-settings").setAttribute("aria-expanded", String(open));
}

function askForKey() {
  openSettings(true);
  at("api-key").focus();
}

try {
  for (const id of SETTINGS) {
    at(id).value = sessionStorage.getItem(id) ?? "";
    at(id).addEventListener("input", () => sessionStorage.setItem(id, at(id).value));
  }
} catch {
  // A browser that stores nothing: they hold until the page is left.
}

at("open-settings").addEventListener("click", () => openSettings(at("settings").hidden));
at("api-key").addEventListener("change", () => findModel().catch(() => {}));
at("clear").addEventListener("click", () => {
  running?.abort();
  setRunning(null);
  conversation = [];
  attached = [];
  showAttached();
  turns.replaceChildren();
  prompt.focus();
});
stop.addEventListener("click", () => {
  running?.abort();
  prompt.focus();
});
at("attach").addEventListener("click", () => at("files").click());
at("files").addEventListener("change", async () => {
  const chosen = [...at("files").files];
  at("files").value = "";
  await attach(chosen);
  prompt.focus();
});
document.addEventListener("paste", (event) => {
  if (at("attach").hidden || !event.clipboardData.files.length) return;
  event.preventDefault();
  attach([...event.clipboardData.files]);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else if (!at("settings").hidden) {
    openSettings(false);
    at("open-settings").focus();
  }
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
addEventListener("pagehide", () => running?.abort()); // a browser that keeps the page to come back to would read on

watchHealth();
