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
tasks = Path("/proc/self/task").iterdir()
workers = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
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
    assert len(workers) == 1
    assert not Path(f"/proc/{workers[0]}").exists()
