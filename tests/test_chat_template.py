"""The built-in chat templates give what DeepSeek's published encoding gives: fixtures/chat, rendered as transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import pytest

from ggufx import chat_templates

CASES = json.loads((Path(__file__).parent.parent / "fixtures" / "chat" / "deepseek-v4.json").read_text())["cases"]


def environment(*, strict_blocks: bool = True) -> jinja2.Environment:
    """Transformers' environment; llama.cpp's differs in nothing that the templates use, but knows ``from_json``."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=strict_blocks, lstrip_blocks=strict_blocks)
    made.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    made.globals["raise_exception"] = refuse
    return made


TEMPLATES = {release: environment().from_string(chat_templates.deepseek_v4(release)) for release in ("preview", "0731")}


def ids(case: dict[str, Any]) -> str:
    variables = [f"{name}={value}"[:24] for name, value in case["variables"].items()]
    return "-".join([case["name"], case["release"], *variables]).replace(" ", "_")


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_conversations_are_rendered_as_published(case: dict[str, Any]) -> None:
    asks = case["messages"][-1]["role"] != "assistant"
    rendered = TEMPLATES[case["release"]].render(
        messages=case["messages"], add_generation_prompt=asks, bos_token="ignored", **case["variables"]
    )
    assert rendered == case["rendered"]


def test_white_space_of_blocks_does_not_matter() -> None:
    plain = environment(strict_blocks=False).from_string(chat_templates.deepseek_v4("preview"))
    for case in (c for c in CASES if c["release"] == "preview" and c["messages"][-1]["role"] != "assistant"):
        rendered = plain.render(messages=case["messages"], add_generation_prompt=True, **case["variables"])
        assert rendered == case["rendered"]


def test_without_a_generation_prompt_the_assistant_does_not_begin() -> None:
    messages = [{"role": "user", "content": "Hi."}]
    for thinking in (False, True):
        rendered = TEMPLATES["preview"].render(messages=messages, add_generation_prompt=False, thinking=thinking)
        assert rendered == "<｜begin▁of▁sentence｜><｜User｜>Hi."


def test_names_of_the_switch() -> None:
    messages = [{"role": "user", "content": "Hi."}]
    head = "<｜begin▁of▁sentence｜><｜User｜>Hi.<｜Assistant｜>"
    render = TEMPLATES["0731"].render
    assert render(messages=messages, add_generation_prompt=True) == head + "</think>"
    assert render(messages=messages, add_generation_prompt=True, enable_thinking=True) == head + "<think>"
    assert (
        render(messages=messages, add_generation_prompt=True, enable_thinking=True, thinking=False) == head + "</think>"
    )


def test_arguments_as_text_are_parsed_where_the_program_can() -> None:
    case = next(c for c in CASES if c["name"] == "values of every kind" and c["variables"] == {"thinking": False})
    messages = json.loads(json.dumps(case["messages"]))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    made = environment()
    made.filters["from_json"] = json.loads
    rendered = made.from_string(chat_templates.deepseek_v4("preview")).render(
        messages=messages, add_generation_prompt=True, **case["variables"]
    )
    assert rendered == case["rendered"]


def test_a_strange_role_is_refused() -> None:
    with pytest.raises(jinja2.TemplateError, match="DeepSeek-V4 has no role critic"):
        TEMPLATES["preview"].render(messages=[{"role": "critic", "content": "x"}])


def test_a_release_that_is_not_there() -> None:
    with pytest.raises(KeyError):
        chat_templates.deepseek_v4("9999")
