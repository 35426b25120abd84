"""Texts by a stranger who means harm, by what reads them.

`PROMPTS` for any node that takes a prompt, `SETTINGS` for the further settings of a training, `JSON` for any file of
JSON, `STYLES` for names of styles, `FLAGS` for prompts with flags, `AXES` for values to compare. Each must be worked on
or refused in words within about a second, with a message of a line or two, and without taking memory.
"""

_MANY = 100_000

PROMPTS = {
    "long word": "a" * _MANY,
    "hosts": "a." * _MANY,
    "tags": "<a " * _MANY,
    "encoded tags": "%3Ca " * _MANY,
    "entities": "&#1" * _MANY,
    "large entity": f"&#{'1' * _MANY};",
    "spaces": " " * _MANY,
    "open brackets": "(" * _MANY,
    "deep brackets": "(" * _MANY + "cat" + ")" * _MANY,
    "deep weights": "(" * 5000 + "cat" + ":1.1)" * 5000,
    "brackets side by side": "(a:1.1)" * 5000,
    "embeddings": "embedding:a " * 5000,
    "lines": "cat\n" * _MANY,
    "controls": "a\x00b\x1b[31m\u202ec" * 1000,
}
FLAGS = {
    "digits": f"a cat --ar {'1' * _MANY}:1",
    "large number": f"a cat --hw {'9' * 400}:{'9' * 400}",
    "spaces": f"a cat --ar{' ' * _MANY}x",
    "many": "--ar 1: " * _MANY,
}


def nested_aliases(levels: int) -> str:
    """YAML of a few hundred bytes that stands for 9 to the power of `levels` texts."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


SETTINGS = {
    "aliases": nested_aliases(9),
    "merged": "a: &a {rank: 4}\n<<: *a",
    "tag": "rank: !!python/object/apply:os.system ['true']",
    "own tag": "rank: !int 4",
    "twice": "rank: 4\nrank: 8",
    "deep list": "[" * _MANY,
    "deep lists": "rank: " + "[" * 20_000 + "]" * 20_000,
    "deep dashes": "rank:\n " + "- " * 2000 + "x",
    "large": "# " + "x" * 10**6,
    "digits": f"rank: {'1' * 5000}",
    "large number": f"rank: {'9' * 400}",
    "time": "rank: 2001-99-99",
    "unknown names": "\n".join(f"{'x' * 90}{number}: 1" for number in range(200)),
    "no mapping": "x" * 20_000,
    "list for a number": f"rank: [{'1, ' * 5000}]",
    "pattern": f"targets: custom\ntarget_pattern: '({'x' * 20_000}'",
    "weights": "timestep_weights: " + "[" * 30 + "]" * 30,
    "numbers as texts": f"rank: '{'9' * 20_000}'",
}
JSON = {
    "deep lists": "[" * _MANY + "]" * _MANY,
    "deep objects": '{"a":' * _MANY + "1" + "}" * _MANY,
    "open lists": "[" * _MANY,
    "digits": f'{{"a": {"1" * _MANY}}}',
    "long text": f'"{"x" * 10**6}"',
    "no JSON": "x" * 10**6,
    "half a pair": '{"\\ud800": "\\udfff"}',
}
STYLES = {"stars": "*\n" * _MANY, "one name": "x" * _MANY, "names": "\n".join(map(str, range(_MANY)))}
AXES = {"commas": "1," * 10**6, "lines": "1\n" * 10**6, "digits": "1" * _MANY}
