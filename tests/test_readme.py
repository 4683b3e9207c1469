"""The README says what is so: flags, defaults, fields, commands and files."""

import dataclasses
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from dashinfer.config import ServerConfig, choices

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCH_READMES = [(ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in ("dashinfer/bench", "bench/serve")]
FIELDS = dataclasses.fields(ServerConfig)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def marked_command(marker: str) -> str:
    found = re.findall(rf"^<!-- {marker} -->\n```bash\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"one block is marked {marker!r}"
    return found[0].strip()


def flag_rows() -> dict[str, tuple[str, str]]:
    """Flag -> (default, meaning) of the README's tables."""
    return {
        flag: (default, meaning)
        for flag, default, meaning in re.findall(r"^\| `(--[\w-]+)` \| (.*?) \| (.*) \|$", README, re.M)
    }


def printed_default(field: dataclasses.Field) -> str:
    if described := re.search(r"\(default: (.*)\)", field.metadata["help"]):
        return re.sub(r"(--[\w-]+)", r"`\1`", described[1])
    if field.default is dataclasses.MISSING:
        return "*(required)*"
    if field.default in (None, ()):
        return "*(none)*"
    if field.type is bool:
        return "on" if field.default else "off"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def test_the_flag_table_has_every_flag_and_no_other_in_order() -> None:
    assert list(flag_rows()) == ["--" + field.name.replace("_", "-") for field in FIELDS]


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_the_flag_table_has_the_default_and_the_choices(field: dataclasses.Field) -> None:
    default, meaning = flag_rows()["--" + field.name.replace("_", "-")]

    assert default == printed_default(field)
    for choice in choices(field) or ():
        assert f"`{choice}`" in meaning


def test_the_two_commands_are_one_line_each_of_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    for marker, program in (("serve command", "dashinfer_serve --model demo"), ("test command", "python -m pytest")):
        match = re.fullmatch(r'pip install -e "\.\[([\w,]+)\]" && (.*)', marked_command(marker))
        assert match is not None
        assert match[2] == program
        assert set(match[1].split(",")) <= set(extras)


def test_ci_runs_exactly_the_readmes_test_command() -> None:
    shown = subprocess.run([ROOT / ".ci" / "run", "--show"], capture_output=True, text=True, check=True)
    script = (ROOT / ".ci" / "run").read_text()

    assert shown.stdout.strip() == marked_command("test command")
    assert "pip install" not in script
    assert "pytest" not in script


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_compile(code: str) -> None:
    compile(code, "README.md", "exec")


def test_bodies_of_curl_examples_are_json() -> None:
    bodies = [body for block in blocks("bash") for body in re.findall(r"-d '(.*?)'$", block, re.DOTALL | re.MULTILINE)]

    assert len(bodies) >= 5
    for body in bodies:
        assert json.loads(body)["messages"]


def test_shell_examples_use_flags_that_exist() -> None:
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    served = [line for line in commands if line.startswith(("dashinfer_serve", "python -m dashinfer.serving"))]

    assert len(served) >= 8
    assert {flag for line in served for flag in re.findall(r" (--[\w-]+)", line)} <= set(flag_rows())


@pytest.mark.parametrize("text", [README, *BENCH_READMES], ids=["README", "dashinfer_bench", "bench.serve"])
def test_bench_examples_use_flags_that_exist(text: str) -> None:
    from bench.serve.__main__ import make_parser as make_serve_parser
    from dashinfer.bench.cli import make_parser

    commands = [line for block in blocks("bash", text) for line in block.replace("\\\n", " ").splitlines()]
    used = 0
    for start, parser in (("dashinfer_bench", make_parser()), (r".*-m bench\.(?:serve|vlm) ", make_serve_parser())):
        known = {flag for action in parser._actions for flag in action.option_strings}
        for line in (re.sub(r"\"[^\"]*\"|'[^']*'", "", line) for line in commands if re.match(start, line)):
            used += 1
            assert set(re.findall(r" (--[\w-]+)", line)) <= known

    assert used


def test_links_and_named_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]

    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_field_of_a_request_is_in_the_readme() -> None:
    chat = pytest.importorskip("dashinfer.protocol.chat", reason="the protocol is not in this tree")
    section = README.partition("### Fields of a chat completion")[2].partition("## Flags")[0]
    documented = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", section, re.M))))

    assert documented == set(chat.ChatCompletionRequest.model_fields)
