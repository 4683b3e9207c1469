"""`python -m bench.demo_vlm.evaluate URL`: how many held-out pictures a server of `demo-vlm` answers right.

URL is the server's, such as http://127.0.0.1:8000. Pictures go as PNG in `data:` URIs, several requests at a time. The exit
status is 1 where less than `--least` of the answers are right. `--transformers DIRECTORY` in place of a URL asks
transformers' own classes, on CPU.
"""

import argparse
import base64
import io
import json
import os
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from bench.demo_vlm.held_out import Question, held_out, tally

Answer = Callable[[Question], str]


def _as_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def server(url: str, model: str, key: str | None) -> Answer:
    """Asks a server; errors of HTTP are raised."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    endpoint = f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"

    def ask(question: Question) -> str:
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _as_uri(picture)}} for picture in question.pictures
        ]
        parts.append({"type": "text", "text": question.exchange.question})
        body = {"model": model, "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 48}
        request = urllib.request.Request(endpoint, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)["choices"][0]["message"]["content"]

    return ask


def oracle(directory: Path) -> Answer:
    """Asks transformers' model, image processor and tokenizer, in the type of the weights."""
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    processor = Qwen2VLImageProcessorPil.from_pretrained(directory)

    @torch.inference_mode()
    def ask(question: Question) -> str:
        content = [*({"type": "image"} for _ in question.pictures), {"type": "text", "text": question.exchange.question}]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs: dict[str, Any] = {}
        if question.pictures:
            inputs = dict(processor(images=list(question.pictures), return_tensors="pt"))
            pieces = prompt.split("<|image_pad|>")
            counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
            prompt = pieces[0] + "".join(
                "<|image_pad|>" * count + piece for count, piece in zip(counts, pieces[1:], strict=True)
            )
        tokens = tokenizer(prompt, return_tensors="pt")
        kinds = (tokens["input_ids"] == model.config.image_token_id).int()
        output = model.generate(**tokens, **inputs, mm_token_type_ids=kinds, do_sample=False, max_new_tokens=48)
        return tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)

    return ask


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo_vlm.evaluate", description=__doc__)
    parser.add_argument("url", nargs="?", metavar="URL")
    parser.add_argument("--transformers", type=Path, metavar="DIRECTORY")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--model", default="demo-vlm", help="name that the server knows it by (demo-vlm)")
    parser.add_argument("--least", type=float, default=0.97, help="share of answers that must be right (0.97)")
    parser.add_argument("--wrong", action="store_true", help="print the answers that are wrong")
    arguments = parser.parse_args()
    if (arguments.url is None) == (arguments.transformers is None):
        parser.error("give a URL, or --transformers DIRECTORY")
    questions = list(held_out(arguments.count))
    if arguments.url is None:
        answers = list(map(oracle(arguments.transformers), questions))
    else:
        ask = server(arguments.url, arguments.model, os.environ.get("OPENAI_API_KEY"))
        with ThreadPoolExecutor(arguments.concurrency) as pool:
            answers = list(pool.map(ask, questions))
    asked = list(zip(questions, answers, strict=True))
    if arguments.wrong:
        for question, answer in asked:
            if answer.strip() != question.exchange.answer:
                print(f"{question.exchange.question} {answer!r}, not {question.exchange.answer!r}")
    print(tally(asked))
    right = sum(answer.strip() == question.exchange.answer for question, answer in asked)
    sys.exit(0 if right >= arguments.least * len(asked) else 1)


if __name__ == "__main__":
    main()
