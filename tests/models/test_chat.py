"""Chat templates: the text of transformers; whatever a template tries, it ends soon and is refused by one block."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import write_folder
from transformers import AutoTokenizer

from headgrid.errors import InvalidInput, NotAvailable
from headgrid.models import chat
from headgrid.models.chat import render
from headgrid.models.text import open_text

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = """{%- if tools %}
    {{- raise_exception('no tools here') }}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- if loop.index0 > ns.last_query_index and not loop.last %}{{- ' (more)' }}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
EVERYTHING = """{# a comment #}
  {% for message in messages %}
    {% if loop.index > 3 %}
      {% break %}
    {% endif %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    [{{ message.role | upper }}] {{ message | tojson }} {{ message.content | tojson(indent=2) }}
    {% generation %}
    {{- message.content ~ eos_token }}
    {% endgeneration %}
  {% endfor %}
{{ {'b': 1, 'a': ['é', '<&>']} | tojson(sort_keys=true, separators=(',', ':')) }}
{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('ha') }} {{ missing }}|{{ tools }}|{{ documents is none }}
{{ strftime_now('%Y')|length }}{{ range(3)|list }}{{ '%05.2f' % 3.14159 }}{{ "{:>4}".format(7) }}"""
TEMPLATES = {"Llama 3": LLAMA_3, "ChatML": CHATML, "Gemma": GEMMA, "everything": EVERYTHING}
USER = {"role": "user", "content": "  Why is the sky blue? <|im_end|> 👍🏽\n"}
CONVERSATIONS = {
    "one message": [USER],
    "turns": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nScattering."}, USER],
    "answer last": [USER, {"role": "assistant", "content": "Scattering."}],
    "system": [{"role": "system", "content": 'Be "brief" & <kind>.'}, USER],
    "other roles": [{"role": "tool", "content": "{}", "name": "f"}, USER, {"role": "critic", "content": ""}],
}


def expected(folder: Path, messages: list[dict[str, str]], prompt: bool) -> str | None:
    """As transformers renders it; None where it does not."""
    theirs = AutoTokenizer.from_pretrained(folder)
    try:
        return theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception:
        return None


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_rendered_as_transformers_renders_them(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, chat_template=TEMPLATES[name])
    text, theirs = open_text(folder), AutoTokenizer.from_pretrained(folder)
    assert text is not None
    refused, seen = 0, set()
    for messages in CONVERSATIONS.values():
        for prompt in (True, False):
            wanted = expected(folder, messages, prompt)
            if wanted is None:
                refused += 1
                with pytest.raises(InvalidInput, match="cannot be rendered"):
                    text.render(messages, generation_prompt=prompt)
                continue
            seen.add(wanted)
            assert text.render(messages, generation_prompt=prompt) == wanted
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            assert text.chat(messages, generation_prompt=prompt) == ids
    assert refused == (4 if name == "Gemma" else 0)
    assert len(seen) >= (5 if name == "everything" else 6), "conversations and prompts give different texts"


def test_a_prompt_is_a_message_of_the_user(tmp_path: Path) -> None:
    text = open_text(write_folder(tmp_path, chat_template=CHATML))
    assert text is not None
    ids = text.prompt("Hi")
    assert ids == text.chat([{"role": "user", "content": "Hi"}])
    assert text.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text.tokenizer.token_to_id("<s>") not in ids, "the template would write it"


FORMS: list[tuple[dict[str, Any], str | None, str | None]] = [  # tokenizer_config.json, chat_template.jinja, text
    ({"chat_template": "one"}, None, "one"),
    ({"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]}, None, "two"),
    ({"chat_template": {"default": "three", "rag": "x"}}, None, "three"),
    ({"chat_template": "x"}, "four é", "four é"),
    ({}, "five", "five"),
    ({"chat_template": None}, None, None),
    ({}, None, None),
]


@pytest.mark.parametrize(("config", "file", "wanted"), FORMS, ids=str)
def test_where_a_template_may_be(config: dict[str, Any], file: str | None, wanted: str | None, tmp_path: Path) -> None:
    write_folder(tmp_path, **config)
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file, encoding="utf-8")
    text = open_text(tmp_path)
    assert text is not None
    assert text.template == wanted
    if wanted is not None:
        assert text.render([USER]) == wanted == expected(tmp_path, [USER], True)


@pytest.mark.parametrize(
    "wrong", [7, True, ["x"], [{"name": "rag", "template": "x"}], {"rag": "x"}, {"default": 7}, [{"name": []}], []]
)
def test_what_is_no_template_is_refused(wrong: object, tmp_path: Path) -> None:
    write_folder(tmp_path, chat_template=wrong)
    with pytest.raises(InvalidInput, match="chat_template"):
        open_text(tmp_path)


def test_files_that_are_no_template_are_refused(tmp_path: Path) -> None:
    path = write_folder(tmp_path) / "chat_template.jinja"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="UTF-8"):
        open_text(tmp_path)
    path.write_text("x" * ((1 << 20) + 1))
    with pytest.raises(InvalidInput, match="too large"):
        open_text(tmp_path)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(InvalidInput, match="leads out"):
        open_text(tmp_path)


MEMORY, TIME, LENGTH, FORBIDDEN = "memory", "takes more than 0.5 s", "characters", "must not have"
HOSTILE = {  # template: what the refusal says
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": TIME,
    "{{ 'a' * 10**9 }}": MEMORY,
    "{{ 'a' * 10**7 }}": LENGTH,
    "{{ [0] * 10**9 }}": MEMORY,
    "{{ (9**(9**9)) is odd }}": TIME,
    "{{ 'x'|center(10**10) }}": MEMORY,
    "{{ '%1000000000d' % 1 }}": MEMORY,
    "{{ '{:>1000000000}'.format(1) }}": MEMORY,
    "{{ ('1' * 200000)|replace('1', '1' * 200000) }}": MEMORY,
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}": MEMORY,
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}": TIME,
    "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|tojson }}": TIME,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": TIME,
    "{{ lipsum(n=10**6) }}": TIME,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "RecursionError",
    "{{ [" + "range(99999)|list," * 20000 + "] }}": "",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": FORBIDDEN,
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}": FORBIDDEN,
    "{{ (''|attr('__class__')).x }}": FORBIDDEN,
    "{{ '{0.__class__.__mro__}'.format(1) }}": FORBIDDEN,
    "{{ messages.append(1) }}": FORBIDDEN,
    "{% include '/etc/passwd' %}": "no loader",
    "{% import 'os' as os %}": "no loader",
    "{% endfor %}": "unknown tag",
    "{{ nothing.at.all }}": "undefined",
    "{{ raise_exception('\\x1b[31m\\nerror: all is well' ~ 'x' * 10**5) }}": "refuses this conversation",
    "{{ raise_exception() }}": "TypeError",
}


@pytest.mark.parametrize("template", HOSTILE, ids=lambda template: template[:60])
def test_a_hostile_template_is_refused_soon(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(InvalidInput) as caught:
        render(template, [USER], {})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert HOSTILE[template] in caught.value.why
    block = caught.value.block()
    assert len(block) < 600
    assert block.isprintable() or set(block) - {"\n"} <= set(map(chr, range(32, 127)))
    assert len(block.splitlines()) == 3, "a template writes no lines of its own"
    assert list(tmp_path.iterdir()) == []


CHECK_MEMORY = """
import json, resource, sys
from headgrid.errors import InvalidInput
from headgrid.models.chat import render
for template in json.load(sys.stdin):
    try:
        render(template, [{"role": "user", "content": "Hi"}], {})
    except InvalidInput:
        pass
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
"""


def test_hostile_templates_take_little_memory() -> None:
    """Measured from a small process: a child counts its parent's memory until it runs its own program."""
    hungry = json.dumps([template for template, why in HOSTILE.items() if why in (MEMORY, LENGTH, "")])
    done = subprocess.run(
        [sys.executable, "-c", CHECK_MEMORY], input=hungry, capture_output=True, text=True, check=True
    )
    assert 20 < int(done.stdout) < 150


def test_long_conversations_are_rendered() -> None:
    """Limits grow with the messages, which are the user's own."""
    messages = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "x" * 1000}] * 2000
    text = render(CHATML, messages, {})
    assert len(text) > 4e6
    assert text.count("<|im_start|>user") == 2000


def test_rendering_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(5):
        render(CHATML, [USER], {})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 5 < 0.3


def test_conversations_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidInput, match="without messages"):
        render(CHATML, [], {})
    with pytest.raises(InvalidInput, match="JSON"):
        render(CHATML, [{"role": "user", "content": {1, 2}}], {})


def test_a_process_that_cannot_start_or_fails_is_not_the_template_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.sys, "executable", "/nowhere/python")
    with pytest.raises(NotAvailable, match="cannot start"):
        render("x", [USER], {})
    monkeypatch.setattr(chat.sys, "executable", "/bin/false")
    with pytest.raises(NotAvailable, match="failed"):
        render("x", [USER], {})


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "sleeps"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(chat.sys, "executable", str(program))
    monkeypatch.setattr(chat, "_WALL_S", 0.2)
    with pytest.raises(InvalidInput, match="cannot be rendered"):
        render("x", [USER], {})
