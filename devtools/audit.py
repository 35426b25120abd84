"""The command `audit`: known faults of the packages that are installed, asked of the package index by pip-audit."""

import json
import subprocess
from pathlib import Path

from .process import DevError, child_environment, say

COMMAND = ("-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable")


def audit_packages(python: Path) -> int:
    """Say what is known of an environment's packages; returns 1 when one has a fault, and 0 where there are no data."""
    done = subprocess.run([str(python), *COMMAND], env=child_environment(), capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError) as error:
        lines = done.stderr.strip().splitlines() or ["pip-audit printed nothing"]
        raise DevError(f"The packages could not be audited: {lines[-1]}") from error
    return report(packages)


def report(packages: list[dict]) -> int:
    """packages: as pip-audit lists them, each with `vulns`, or with a `skip_reason` where nothing is known."""
    known = [each for each in packages if "vulns" in each]
    faults = [(each, fault) for each in known for fault in each["vulns"]]
    for package, fault in faults:
        mended = ", ".join(fault.get("fix_versions", ())) or "no version yet"
        say(f"{package['name']} {package['version']}: {fault['id']}, mended in {mended}")
    unknown = len(packages) - len(known)
    if not known:
        say(f"Nothing was audited: the package index gave no data for any of {unknown} packages.")
    else:
        say(f"{len(known)} packages audited, {unknown} without data, {len(faults)} known faults.")
    return 1 if faults else 0
