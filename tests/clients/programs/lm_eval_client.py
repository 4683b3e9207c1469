"""EleutherAI's evaluation harness as a library; one use, which returns results and samples of two tasks."""

import os
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from uses import KEY, MODEL, URL, main, use

TASKS = Path(__file__).parents[1] / "tasks"


os.chdir(TASKS)  # where they look for documents
os.environ["OPENAI_API_KEY"] = KEY


@use
def completions() -> Any:
    arguments = {
        **{"model": MODEL, "base_url": f"{URL}/v1/completions", "auth_token": KEY, "tokenizer_backend": "remote"},
        **{"num_concurrent": 4, "max_length": 1024, "max_retries": 1},
    }
    tasks = ["dashinfer_capitals", "dashinfer_answers"]
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate("local-completions", model_args=arguments, tasks=tasks, task_manager=manager)
    assert found is not None
    samples = {
        name: [each["resps"] for each in sorted(samples, key=lambda each: each["doc_id"])]
        for name, samples in found["samples"].items()
    }
    return found["results"], samples


if __name__ == "__main__":
    main()
