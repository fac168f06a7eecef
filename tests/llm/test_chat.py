"""Chat templates render what transformers renders, and bad messages are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from headway.errors import RequestError
from headway.llm.chat import ChatRenderer
from headway.tokenizers import Tokenizer
from headway.tokenizers.tokenizer import TokenizerInfo

USER = {"role": "user", "content": "Hi <b> & 'you'"}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "漢字?\n"},
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "x": "<é>"}}}]

TEMPLATES = {
    "tools and namespaces": """
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- set state = namespace(count=0) %}
{%- for message in messages %}
    {%- set state.count = state.count + 1 %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {{- bos_token }}{{ message['role'] | upper }}: {{ message['content'] | trim }} #{{ state.count }}
    {% generation %}{{ eos_token }}{% endgeneration %}
{%- endfor %}
{% if add_generation_prompt %}A:{% endif %}
""",
    "loop variables": """{% for m in messages %}{{ loop.index0 }}{{ m.content[:3] }}
{{ '|' if not loop.last }}{% endfor %}
  {% if not add_generation_prompt is defined %}undefined{% endif %}
  {{ messages[-1].missing is defined }} {{ ['a', 'b'] | join('-') }}""",
}


@pytest.fixture(scope="module")
def renderer(tokenizer: Tokenizer) -> ChatRenderer:
    return ChatRenderer(tokenizer)


@pytest.mark.parametrize("template", [None, *TEMPLATES.values()], ids=["the model's", *TEMPLATES])
@pytest.mark.parametrize("messages", [[USER], CONVERSATION])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_as_transformers_does(
    renderer: ChatRenderer, transformers_tokenizer: Any, template: str | None, messages: Any, prompt: bool, tools: Any
) -> None:
    expected = transformers_tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template, add_generation_prompt=prompt, tokenize=False
    )
    assert renderer.render(messages, tools=tools, chat_template=template, add_generation_prompt=prompt) == expected


def test_a_final_message_is_continued_as_transformers_does(renderer: ChatRenderer, transformers_tokenizer: Any) -> None:
    messages = [USER, {"role": "assistant", "content": "The answer is"}]
    expected = transformers_tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert renderer.render(messages, continue_final_message=True) == expected
    assert expected.endswith("The answer is")


def test_template_variables_pass_through(renderer: ChatRenderer) -> None:
    text = renderer.render([USER], chat_template="{{ mood }}{{ eos_token }}", template_kwargs={"mood": "calm"})
    assert text == "calm<|im_end|>"


def test_text_parts_are_joined(renderer: ChatRenderer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = renderer.render([{"role": "user", "content": parts}], chat_template="{{ messages[0].content }}")
    assert text == "one\ntwo"


def test_a_field_that_is_null_is_not_there(renderer: ChatRenderer) -> None:
    messages = [{**USER, "tool_calls": None}, {"role": "tool", "content": "x", "tool_call_id": "1"}]
    template = "{% for message in messages %}{{ message | list | join(' ') }};{% endfor %}"
    assert renderer.render(messages, chat_template=template) == "role content;role content tool_call_id;"


def test_tool_arguments_reach_the_template_as_objects(renderer: ChatRenderer) -> None:
    call = {"function": {"name": "look", "arguments": '{"at": "sky"}'}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    template = "{{ messages[1].tool_calls[0].function.arguments.at }}"
    assert renderer.render(messages, chat_template=template) == "sky"


def test_a_tool_template_is_used_with_tools(tokenizer: Tokenizer) -> None:
    info = TokenizerInfo(chat_templates={"default": "plain", "tool_use": "tools"})
    renderer = ChatRenderer(Tokenizer(tokenizer.backend, info))
    assert (renderer.render([USER]), renderer.render([USER], tools=TOOLS)) == ("plain", "tools")


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages="),
        ("hello", "messages="),
        ([USER, "hello"], r"messages\[1\]="),
        ([{"content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "user"}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "tool_calls"),
        ([{"role": "user", "content": object()}], "messages="),
    ],
)
def test_bad_messages_are_refused_by_name(renderer: ChatRenderer, messages: Any, field: str) -> None:
    with pytest.raises(RequestError, match=field):
        renderer.render(messages)


def test_a_template_that_raises_is_a_request_error(renderer: ChatRenderer) -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        renderer.render([USER], chat_template="{{ raise_exception('roles must alternate') }}")


def test_a_template_with_bad_syntax_is_a_request_error(renderer: ChatRenderer) -> None:
    with pytest.raises(RequestError, match=r"chat_template=.* in line 2"):
        renderer.render([USER], chat_template="\n{% if %}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(999999999) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(renderer: ChatRenderer, attack: str) -> None:
    with pytest.raises(RequestError, match="chat template refuses"):
        renderer.render([USER], chat_template=attack)


def test_a_model_without_template_says_so(minilm_tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="brings no chat template"):
        ChatRenderer(minilm_tokenizer).render([USER])
