"""Where the alpha of each change is from: the file, PEFT's configuration with its patterns, or a program's default."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from ..files.documents import parse_json
from ..files.patterns import LENGTH_LIMIT, compile_pattern
from ..quoting import shorten
from .kinds import Difference, Factor, Kronecker
from .names import TEXT_ENCODER_PREFIXES
from .relative import Relative

PEFT_ALPHA = 8.0  # PEFT's own default, which the original's training script leaves as it is
PEFT_CONFIG = "adapter_config.json"
HEADER_KEY = "lora_adapter_metadata"  # where diffusers keeps PEFT's configuration in a file's header
LARGEST = 1e9  # no alpha or rank comes near it; NaN is not below it either


class Settings:
    """Where the alphas come from. peft: the content of adapter_config.json or {}; chosen: overrules everything."""

    def __init__(self, peft: Mapping, chosen: float | None):
        self.peft = peft
        self.chosen = chosen

    def with_alpha(self, factor: Factor, prefix: str, module: str) -> tuple[Factor, str]:
        """The factor with its alpha, and where that is from, in words. module: its name without `prefix`."""
        if isinstance(factor, Difference | Relative):
            return factor, "none"
        if self.chosen is not None:
            return replace(factor, alpha=self.chosen), "chosen by you"
        if factor.alpha is not None:
            return factor, "stored in the file"
        if self.peft:
            rooted = ", times the root of the rank by use_rslora" if self.peft.get("use_rslora") is True else ""
            return self._from_peft(factor, module), PEFT_CONFIG + rooted
        if "base_model.model." in prefix:
            return replace(factor, alpha=PEFT_ALPHA), "PEFT's default, since the file has none"
        return replace(factor, alpha=factor.rank), "the rank, since the file has none"

    def _from_peft(self, factor: Factor, module: str) -> Factor:
        alpha = _number(self.peft.get("lora_alpha", self.peft.get("alpha")), PEFT_ALPHA)
        alpha = self._pattern("alpha_pattern", module, alpha)
        rank = factor.rank or int(self._pattern("rank_pattern", module, _number(self.peft.get("r"), alpha)))
        if self.peft.get("use_rslora") is True:
            alpha *= math.sqrt(rank)  # rsLoRA, arXiv 2312.03732: the scale is alpha / sqrt(rank)
        if factor.rank is None and isinstance(factor, Kronecker):
            # PEFT scales whole matrices as well, by its r.
            return replace(factor, w1=factor.w1.float() * (alpha / rank))
        return replace(factor, alpha=alpha)

    def _pattern(self, name: str, module: str, usual: float) -> float:
        """The number that one of PEFT's patterns has for a module."""
        patterns = self.peft.get(name)
        patterns = patterns if isinstance(patterns, Mapping) else {}
        return next((_number(value, usual) for key, value in patterns.items() if matches(key, module)), usual)


def matches(pattern: str, module: str) -> bool:
    """Whether a key of PEFT's patterns means a module: the end of its name, which may be a regular expression.

    Raises ValueError for one that could go on for hours.
    """
    if module == pattern or module.endswith(f".{pattern}"):
        return True
    try:
        return re.match(rf"(.*\.)?({check_pattern(pattern)})$", module) is not None
    except re.error:
        return False


@lru_cache(maxsize=1024)
def check_pattern(pattern: str) -> str:
    """A pattern as it is. Raises ValueError for one that could go on for hours, re.error for what is none."""
    try:
        if len(pattern) <= LENGTH_LIMIT:  # a longer one is refused below: to compile it takes seconds
            re.compile(pattern)
    except re.error:
        raise
    except (OverflowError, RecursionError) as error:
        raise re.error(str(error)) from error
    try:
        return compile_pattern(pattern).pattern
    except ValueError as error:
        raise ValueError(
            f"Pattern of a LoRA is refused: got {shorten(pattern)} ({error}), expected names of layers or a plain "
            f"pattern of them. Save the LoRA with the names themselves."
        ) from error


def _number(value: object, default: float) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST
    return float(value) if fits else float(default)


def stored_config(metadata: Mapping[str, str] | None) -> dict:
    """PEFT's configuration from a header, whose keys name the pipeline's part first, `transformer.lora_alpha`."""
    try:
        stored = parse_json((metadata or {}).get(HEADER_KEY, "{}"))
        own = {key: value for key, value in stored.items() if not key.startswith(TEXT_ENCODER_PREFIXES)}
        return {key.partition(".")[2] or key: value for key, value in own.items()}
    except (ValueError, AttributeError):
        return {}  # a header is no more than a note: the tensors say the rest
