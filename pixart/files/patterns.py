"""Regular expressions by strangers, over names of layers: those that could go on for hours are refused."""

import re

from ..quoting import shorten

LENGTH_LIMIT = 1000
REPEAT_LIMIT = 4  # over a name of 40 letters, each more multiplies the ways to try by ten
_PLAIN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?", re.DOTALL)  # escaped signs, classes, kinds of groups


def compile_pattern(pattern: str) -> re.Pattern:
    """The compiled pattern. Raises ValueError for one that is none, or that repeats a group or repeats too often."""
    if len(pattern) > LENGTH_LIMIT:
        raise ValueError(f"{len(pattern)} characters, and at most {LENGTH_LIMIT} are taken")
    signs = _PLAIN.sub("_", pattern)
    if re.search(r"\)[*+{]", signs):
        raise ValueError("a repeated group, which can take hours; write it without * or + behind the bracket")
    if len(re.findall(r"[*+?{]+", signs)) > REPEAT_LIMIT:
        raise ValueError(f"more than {REPEAT_LIMIT} of * + ? {{, which can take hours")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(shorten(error, 200)) from error
