"""Parts that run one after another within a time, each of which may fail: what they found is kept as it comes."""

import json
import logging
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """One line of the result. limit: what the value may be at most; None where it is only measured.

    unit: of the value, "" for a relative error. error: why there is no value.
    """

    part: str
    name: str
    value: float | None = None
    limit: float | None = None
    unit: str = ""
    error: str = ""

    @property
    def is_right(self) -> bool:
        return not self.error and (self.limit is None or (self.value is not None and self.value <= self.limit))


@dataclass(frozen=True)
class Part:
    """run: (seconds that are left) -> what was found. least_s: below this it is not begun."""

    name: str
    run: Callable[[float], Sequence[Finding]]
    least_s: float = 0


def check(part: str, name: str, measure: Callable[[], float], limit: float | None = None, unit: str = "") -> Finding:
    """A finding by a measurement, which may fail with any exception: the rest is still to be measured."""
    try:
        return Finding(part, name, float(measure()), limit, unit)
    except Exception as error:
        logger.debug("%s", traceback.format_exc())
        return Finding(part, name, None, limit, unit, f"{type(error).__name__}: {error}".splitlines()[0][:300])


class Results:
    """The findings of one device in a JSON file. Parts that it holds are not run again."""

    def __init__(self, path: Path, about: dict):
        """about: what the findings depend on; the file of another device or state is begun anew."""
        self.path, self.about, self.parts = path, about, {}
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["about"] == about:
                self.parts = {
                    name: [Finding(**each) for each in findings] for name, findings in content["parts"].items()
                }

    def add(self, name: str, findings: Sequence[Finding]) -> None:
        self.parts[name] = list(findings)
        parts = {name: [asdict(each) for each in findings] for name, findings in self.parts.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"about": self.about, "parts": parts}, indent=1) + "\n", encoding="utf-8")


def run_parts(parts: Sequence[Part], results: Results, budget_s: float) -> list[str]:
    """Run the parts that the results lack. Returns the names of those for which no time was left.

    A part that is not done in the time that is left ends with TimeoutError or TimeoutExpired, and counts among them.
    """
    ends, left_out = time.monotonic() + budget_s, []
    for part in parts:
        left_s = ends - time.monotonic()
        if part.name in results.parts:
            logger.info("%s: done before", part.name)
        elif left_s < part.least_s:
            left_out.append(part.name)
        else:
            began = time.monotonic()
            try:
                findings = part.run(left_s)
            except (TimeoutError, subprocess.TimeoutExpired):
                left_out.append(part.name)
                continue
            except Exception as error:
                logger.debug("%s", traceback.format_exc())
                findings = [Finding(part.name, "all", error=f"{type(error).__name__}: {error}".splitlines()[0][:300])]
            results.add(part.name, findings)
            for each in findings:
                logger.info("%s", describe(each))
            logger.info("%s: %.0f s", part.name, time.monotonic() - began)
    return left_out


def describe(finding: Finding) -> str:
    return " | ".join([finding.part, finding.name, describe_value(finding), describe_limit(finding), verdict(finding)])


def describe_value(finding: Finding) -> str:
    if finding.value is None:
        return finding.error or "-"
    return f"{finding.value:.3g}{' ' if finding.unit else ''}{finding.unit}"


def describe_limit(finding: Finding) -> str:
    return "" if finding.limit is None else f"{finding.limit:.3g}"


def verdict(finding: Finding) -> str:
    if finding.error:
        return "failed"
    return "" if finding.limit is None else "right" if finding.is_right else "WRONG"
