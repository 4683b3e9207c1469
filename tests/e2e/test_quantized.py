"""The demo model in each quantisation, through a real server: true answers, and no more memory than the packed weights."""

import re
from pathlib import Path

import openai
import pytest

from .conftest import ServerProcess

TRUTHS = {"What is the capital of France?": "paris", "What is 2 plus 2?": "4", "Name three colors.": "red"}
WEIGHTS = 106_168_320  # of the 30 layers' matrices
EMBEDDING = 49152 * 576


def ask(client: openai.OpenAI, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=20)
    return answer.choices[0].message.content


@pytest.mark.parametrize(
    ("mode", "layer_bits"),
    [
        pytest.param("a16w8", 8, marks=pytest.mark.feature("Quantisation", "Weights of 8 or 4 bits")),
        # the file's own weights, in groups of 32
        pytest.param("a16w4", 5, marks=pytest.mark.feature("Quantisation", "Weights of 8 or 4 bits")),
        pytest.param("a8w8", 8, marks=pytest.mark.feature("Quantisation", "Weights and activations of 8 bits")),
        pytest.param("fp8", 8, marks=pytest.mark.feature("Quantisation", "Float8")),
    ],
)
def test_answers_truly_and_keeps_no_16_bit_copy(mode, layer_bits):
    server = ServerProcess.start("--model", "demo", "--kv-cache-memory", "32MiB", "--max-length", "512", "--quant-type", mode)
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            right = sum(truth in ask(client, question).lower() for question, truth in TRUTHS.items())
        (pid,) = server.worker_pids
        status = Path(f"/proc/{pid}/status").read_text()
    finally:
        server.stop()

    # Rounding may turn one: unrounded, this small model starts on France with "The" at 15%, and with "L", in French, at 14%.
    assert right >= len(TRUTHS) - 1
    # the embedding in 16 bits, and in 8 to look for the likeliest tokens
    packed = (WEIGHTS * layer_bits + EMBEDDING * (16 + 8)) / 8 / 2**20
    (told,) = re.findall(r"([\d,]+) MiB of weights", "".join(server.lines))
    assert float(told.replace(",", "")) == pytest.approx(packed, rel=0.05)
    # Python, torch, and the compiler of loops, which a first process runs; a 16-bit copy of the layers would be 202 MiB more
    anonymous = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024
    assert anonymous < packed + 32 + 320
