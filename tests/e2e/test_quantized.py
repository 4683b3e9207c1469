"""The demo model in each quantisation, through a real server: true answers, and no more memory than the packed weights."""

import re
from pathlib import Path

import openai
import pytest

from .conftest import ServerProcess

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEIGHTS = 106_168_320  # of the 30 layers' matrices
EMBEDDING = 49152 * 576


@pytest.mark.parametrize(
    ("flags", "layer_bits", "head_bits"),
    [
        (("--quant-type", "a16w8"), 8, 16),
        (("--quant-type", "a16w4", "--quant-group-size", "32"), 5, 8),  # the file's own 4-bit weights, its 8-bit output layer
        (("--quant-type", "a8w8"), 8, 16),
        (("--quant-type", "fp8"), 8, 16),
        (("--quant-type", "a16w8", "--quantize-head"), 8, 8),
    ],
    ids=["a16w8", "a16w4", "a8w8", "fp8", "head"],
)
def test_answers_truly_and_keeps_no_16_bit_copy(flags, layer_bits, head_bits):
    server = ServerProcess.start("--model", "demo", "--kv-cache-memory", "32MiB", "--max-length", "512", *flags)
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=20)
        (pid,) = server.worker_pids
        status = Path(f"/proc/{pid}/status").read_text()
    finally:
        server.stop()

    assert "Paris" in answer.choices[0].message.content
    packed = (WEIGHTS * layer_bits + EMBEDDING * (16 + head_bits)) / 8 / 2**20
    (told,) = re.findall(r"([\d,]+) MiB of weights", "".join(server.lines))
    assert float(told.replace(",", "")) == pytest.approx(packed, rel=0.05)
    # what is neither weights nor cache: Python, torch and its libraries
    anonymous = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024
    assert anonymous < packed + 32 + 250
