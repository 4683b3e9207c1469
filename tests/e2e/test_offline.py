"""`LLM` on the demo model, in a script that forgets to close it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dashinfer.sources import ModelSource

SCRIPT = """
import json
from pathlib import Path
from dashinfer import LLM

llm = LLM("demo", kv_cache_memory="256MiB", log_level="warning")
questions = ["What is the capital of France?", "What is the capital of Germany?"]
chats = llm.chat([[{"role": "user", "content": question}] for question in questions], {"temperature": 0, "max_tokens": 24})
(text,) = llm.generate("The capital of France is", {"temperature": 0, "max_tokens": 4})
def children(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]

(template,) = children("self")
workers = [template, *children(template)]
print(json.dumps([[chat.choices[0].message.content for chat in chats], text.choices[0].text, workers]))
"""


@pytest.mark.feature("Clients", "Python without a server")
def test_a_script(demo: ModelSource) -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=90)

    assert result.returncode == 0, result.stderr
    (france, germany), text, workers = json.loads(result.stdout)
    assert "Paris" in france
    assert "Berlin" in germany
    assert "Paris" in text
    assert len(workers) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
