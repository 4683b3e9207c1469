"""A chat server that is transformers' `generate` over whatever requests wait, as one batch: a peer for `bench.vlm`.

    python bench/vlm/batched_generate.py DIRECTORY --port 8102 [--batch 8] [--data-type bfloat16]

The least that batches: requests that arrive while a batch is under way wait for its end, and a batch waits for requests that
are on their way. Each answer is sent in two pieces, the first token and the rest, and has all the tokens that were asked for.
Needs transformers, torchvision and Pillow; nothing else of this project.
"""

import argparse
import base64
import contextlib
import io
import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.generation.streamers import BaseStreamer

GATHER_SECONDS = 0.005  # that a batch waits for the next request, and as long as any is being read


class Request:
    """A chat with its pictures decoded. `pieces` gets the first tokens of the answer, then the rest."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.max_tokens: int = body["max_tokens"]
        self.messages = [
            {"role": message["role"], "content": [_part(part) for part in _parts(message["content"])]}
            for message in body["messages"]
        ]
        self.prompt_tokens = 0
        self.pieces: queue.SimpleQueue[list[int]] = queue.SimpleQueue()


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image_url":
        return part
    _, _, data = part["image_url"]["url"].partition("base64,")
    return {"type": "image", "image": Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")}


class FirstTokens(BaseStreamer):
    """Hands out each request's first token as soon as it is there."""

    def __init__(self, batch: list[Request]) -> None:
        self._batch = batch
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the first call brings the prompts
            for request, token in zip(self._batch, value.flatten().tolist(), strict=True):
                request.pieces.put([token])

    def end(self) -> None:
        pass


class Model:
    def __init__(self, directory: str, data_type: str, batch: int) -> None:
        self.processor = AutoProcessor.from_pretrained(directory)
        self.processor.tokenizer.padding_side = "left"
        self.model = AutoModelForImageTextToText.from_pretrained(directory, dtype=getattr(torch, data_type)).eval()
        self.model.generation_config.eos_token_id = [-1]
        self.waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self.reading = 0  # requests that are being read and decoded
        self._batch = batch

    def run(self) -> None:
        """For ever."""
        while True:
            batch = [self.waiting.get()]
            more = True
            while more and len(batch) < self._batch:
                more = self.reading > 0
                with contextlib.suppress(queue.Empty):
                    batch.append(self.waiting.get(timeout=GATHER_SECONDS))
                    more = True
            self._answer(batch)

    def _answer(self, batch: list[Request]) -> None:
        inputs = self.processor.apply_chat_template(
            [request.messages for request in batch],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        for request, mask in zip(batch, inputs["attention_mask"], strict=True):
            request.prompt_tokens = int(mask.sum())
        longest = max(request.max_tokens for request in batch)
        with torch.inference_mode():
            outputs = self.model.generate(**inputs, max_new_tokens=longest, do_sample=False, streamer=FirstTokens(batch))
        for request, tokens in zip(batch, outputs[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            request.pieces.put(tokens[1 : request.max_tokens])


class Handler(BaseHTTPRequestHandler):
    model: Model
    lock = threading.Lock()
    protocol_version = "HTTP/1.0"  # the end of an answer is the end of its connection

    def do_POST(self) -> None:
        with self.lock:
            self.model.reading += 1
        request = Request(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.model.waiting.put(request)
        with self.lock:
            self.model.reading -= 1
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        total = 0
        for finish in (None, "length"):
            tokens = request.pieces.get()
            total += len(tokens)
            text = self.model.processor.tokenizer.decode(tokens)
            self._event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})
        self._event({"choices": [], "usage": {"prompt_tokens": request.prompt_tokens, "completion_tokens": total}})

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="the model")
    parser.add_argument("--port", type=int, default=8102)
    parser.add_argument("--batch", type=int, default=8, help="requests at a time (8)")
    parser.add_argument("--data-type", default="bfloat16", choices=["bfloat16", "float32"])
    arguments = parser.parse_args()
    Handler.model = Model(arguments.directory, arguments.data_type, arguments.batch)
    threading.Thread(target=Handler.model.run, daemon=True).start()
    Server(("127.0.0.1", arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
