"""Renders a chat template by a stranger, alone in a process of its own, which `chat_templates` starts and stops.

A template is a program: in its sandbox it reaches nothing, but it may loop for ever or grow without end, and within
Python nothing stops that for sure. Standard library and jinja2 alone, so that the process starts in no time.
"""

import json
import sys
from datetime import datetime

MOST_BYTES = 512 * 2**20  # of memory for all of the process, where the system can bound it
MOST_LETTERS = 200_000  # of a rendered chat: many times what any model reads


def _bound_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows, where the time alone is bounded
        return
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))


def _environment():
    """Jinja's sandbox with what the documentation of transformers' chat templates promises to them."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: marks the model's own words for training, and shows them as they are."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


def _render(request: dict) -> dict:
    """{"texts"} of a request's chats, or {"error"} in words."""
    texts = []
    try:
        template = _environment().from_string(request["template"])
        for messages in request["chats"]:
            parts, letters = [], 0
            for part in template.generate(messages=messages, add_generation_prompt=True, **request["tokens"]):
                letters += len(part)
                if letters > MOST_LETTERS:
                    return {"error": f"more than {MOST_LETTERS} letters"}
                parts.append(part)
            texts.append("".join(parts))
    except MemoryError:
        return {"error": "too much memory"}
    except Exception as error:  # whatever a template does wrong is said in words
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"texts": texts}


if __name__ == "__main__":
    _bound_memory()
    answer = json.dumps(_render(json.loads(sys.stdin.buffer.read())))
    sys.stdout.write(answer)
