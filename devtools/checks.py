"""The checks of `lint`: Python's style and format, and the files that GitHub reads."""

from pathlib import Path

from .process import ROOT

GITHUB = ROOT / ".github"
SCHEMAS = {  # a schema that check-jsonschema carries: the files that it describes
    "vendor.github-workflows": "workflows/*.yml",
    "custom.github-workflows-require-timeout": "workflows/*.yml",
    "vendor.github-issue-forms": "ISSUE_TEMPLATE/[!c]*.yml",
    "vendor.github-issue-config": "ISSUE_TEMPLATE/config.yml",
    "vendor.dependabot": "dependabot.yml",
}


def lint_commands(python: Path, fix: bool = False) -> list[list]:
    """The commands to run in the repository, with an environment's Python; fix: mend what can be mended."""
    ruff = [["check", "--fix"], ["format"]] if fix else [["check"], ["format", "--check"]]
    commands = [[python, "-m", "ruff", *arguments, "."] for arguments in ruff]
    return commands + schema_commands(python) + [[python.with_name("zizmor"), "--offline", "--quiet", GITHUB]]


def schema_commands(python: Path) -> list[list]:
    """Those that hold each file to its schema; none of them reaches the network."""
    program = [python, "-m", "check_jsonschema", "--builtin-schema"]
    return [[*program, schema, *sorted(GITHUB.glob(pattern))] for schema, pattern in SCHEMAS.items()]
