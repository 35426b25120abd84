"""Chat templates in a process of their own: as transformers renders them, and stopped when they do not end."""

import json
import os
import subprocess
import sys
import time

import pytest

from pixart_pack.pixart.encoders import chat_templates
from pixart_pack.pixart.encoders.chat_templates import render_chats

CHATS = [
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in ("häl\n{{lo}}", "x")
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# As published models write them: trimmed blocks, namespaces, loop controls, JSON, their own errors, training's marks.
TEMPLATES = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "{%- set ns = namespace(n=0) -%}\n{% for m in messages %}\n  {% if m.role == 'system' %}{% continue %}{% endif %}\n"
    "{% set ns.n = ns.n + 1 %}{{ m | tojson(indent=2) }}{{ ns.n }}\n{% endfor %}\n"
    "{% generation %}{{ eos_token }}{% endgeneration %}\n",
    "{% macro show(c) %}[{{ c.text if c.type == 'text' else '<image>' }}]{% endmacro %}"
    "{% for c in messages[0].content[::-1] %}{{ show(c) }}{% endfor %}{{ undefined_name }}",
)
HOSTILE = {
    "loops without end": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
    "a text of a terabyte": ("{{ 'x' * 10**12 }}", "too much memory"),
    "a text that doubles": (
        "{% set ns = namespace(s='xx') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "too much memory",
    ),
    "output without end": ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "more than 200000 letters"),
    "a macro that calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "Python's insides": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "another file": ("{% include '/etc/passwd' %}", "TypeError|no loader"),
    "no template": ("{% for %}", "TemplateSyntaxError"),
    "its own error": ("{{ raise_exception('no\n' * 10**5) }}", "TemplateError: no"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_as_transformers_renders(template):
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    expected, _ = utilities.render_jinja_template(CHATS, chat_template=template, add_generation_prompt=True, **TOKENS)
    assert render_chats(template, CHATS, TOKENS) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(monkeypatch, name):
    template, expected = HOSTILE[name]
    if expected == "seconds":
        monkeypatch.setattr(chat_templates, "SECONDS", 1.0)
    elif expected == "too much memory" and os.name != "posix":
        pytest.skip("Windows bounds the time alone")
    start = time.monotonic()
    with pytest.raises(ValueError, match="Chat template cannot be used: got") as caught:
        render_chats(template, CHATS, TOKENS)
    assert time.monotonic() - start < chat_templates.SECONDS + 5
    assert len(str(caught.value)) < 450 and "\n" not in str(caught.value)
    assert any(part in str(caught.value) for part in expected.split("|"))


def test_the_process_takes_nothing_but_jinja_along():
    program = f"import runpy, sys; runpy.run_path({str(chat_templates._PROGRAM)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", json.dumps(done.stderr)
