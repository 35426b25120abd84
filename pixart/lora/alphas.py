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
        name = "lora_alpha" if "lora_alpha" in self.peft else "alpha"
        alpha = self._pattern("alpha_pattern", module, _number(self.peft.get(name), PEFT_ALPHA, name))
        rank = factor.rank or self._rank(module)
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
        return next((_number(value, usual, name) for key, value in patterns.items() if matches(key, module)), usual)

    def _rank(self, module: str) -> float:
        """The rank of a module whose matrices are whole. Raises ValueError for none that can be divided by."""
        rank = self._pattern("rank_pattern", module, _number(self.peft.get("r"), PEFT_ALPHA, "r"))
        if rank < 1:
            raise _unusable("r", rank)
        return rank


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


def _number(value: object, default: float, name: str) -> float:
    """A number of a configuration, or the usual one where it has none. Raises ValueError for what is no number."""
    if value is None:
        return float(default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise _unusable(name, value)
    return float(value)


def _unusable(name: str, value: object) -> ValueError:
    return ValueError(
        f"Unusable number in {PEFT_CONFIG}: got {shorten(value)} for {shorten(name)}, expected one that "
        f"scales the LoRA. Take the file as PEFT saved it."
    )


def stored_config(metadata: Mapping[str, str] | None) -> dict:
    """PEFT's configuration from a header, whose keys name the pipeline's part first, `transformer.lora_alpha`."""
    try:
        stored = parse_json((metadata or {}).get(HEADER_KEY, "{}"))
        own = {key: value for key, value in stored.items() if not key.startswith(TEXT_ENCODER_PREFIXES)}
        return {key.partition(".")[2] or key: value for key, value in own.items()}
    except (ValueError, AttributeError):
        return {}  # a header is no more than a note: the tensors say the rest
