"""What GitHub and pre-commit read: workflows, forms, and the one hook."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pixart_pack.devtools import checks, commands, environment

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CALLING = [*WORKFLOWS, ROOT / ".pre-commit-config.yaml", ROOT / ".ci" / "run", *ROOT.glob(".github/*.md")]
CALL = re.compile(r"python dev\.py\b([^`\n&|;]*)")
VERSION = 'name = "x"\nversion = "{}"\n'


def read(path: Path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def calls(path: Path) -> list[list[str]]:
    """The arguments of each call of dev.py in a file, a workflow's with every command of its matrix."""
    found = CALL.findall(path.read_text(encoding="utf-8"))
    if path not in WORKFLOWS:
        return [call.split() for call in found]
    matrices = [job["strategy"]["matrix"] for job in read(path)["jobs"].values() if "strategy" in job]
    rows = [
        row for matrix in matrices for row in (*matrix["command"], *(more["command"] for more in matrix["include"]))
    ]
    variable = "${{ matrix.command }}"
    return [call.replace(variable, row).split() for call in found for row in (rows if variable in call else [""])]


@pytest.mark.parametrize("path", CALLING, ids=lambda path: path.name)
def test_what_is_called_are_commands_of_dev_py(path):
    for arguments in calls(path):
        options = commands.parse(arguments)
        assert callable(options.function), arguments


def test_the_commands_that_are_called():
    parsed = [(path.name, commands.parse(call)) for path in CALLING for call in calls(path)]
    assert not any(options.rest for _, options in parsed)
    called = {(name, options.command, options.tier) for name, options in parsed}
    assert {("tests.yml", "test", "quick"), ("tests.yml", "test", None), ("tests.yml", "lint", None)} <= called
    assert {(".pre-commit-config.yaml", "lint", None), ("run", "test", None), ("run", "test", "cpus")} <= called


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_do_little_for_a_limited_time(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all(job["timeout-minutes"] <= 120 for job in workflow["jobs"].values())
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    checkouts = [step for step in steps if step.get("uses", "").startswith("actions/checkout@")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_the_cache_holds_the_environment_and_its_key_all_that_decides_what_is_in_it():
    (job,) = read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"].values()
    (cache,) = [step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/cache@")]
    (call,) = [step["run"] for step in job["steps"] if "run" in step]
    assert "--env ~/environment " in call
    folder = environment.Environment(Path("~/environment"), "key", "0")
    parts = {folder.host, folder.python.parent.parent, folder.stamp, folder.folder / "made-by-pixart-dev"}
    assert {Path(line) for line in cache["path"].split()} == parts
    hashed = {ROOT / name for name in re.findall(r"'([^']+)'", cache["key"])}
    assert hashed == {*environment.installed_files(ROOT / environment.REQUIREMENTS), Path(environment.__file__)}


@pytest.mark.slow
def test_files_are_what_their_schemas_ask_for():
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema: pip install check-jsonschema")
    for command in checks.schema_commands(Path(sys.executable)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_for_github_is_checked():
    covered = {path for pattern in checks.SCHEMAS.values() for path in checks.GITHUB.glob(pattern)}
    files = {path for path in checks.GITHUB.rglob("*.yml") if path.name != "zizmor.yml"}  # that one zizmor itself reads
    assert covered == files and len(WORKFLOWS) >= 2


def test_the_hook_leaves_versions_to_the_requirements():
    (source,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert source["repo"] == "local" and [hook["language"] for hook in source["hooks"]] == ["system"]


@pytest.mark.skipif(os.name == "nt" or not shutil.which("git"), reason="needs bash and git, as GitHub's Linux has them")
@pytest.mark.parametrize(
    ("token", "old", "new", "wanted"),
    [
        ("true", "1.0.0", "1.0.1", "true"),
        ("true", "1.0.0", "1.0.0", "false"),
        ("true", None, "1.0.0", "true"),  # started by hand, or the branch's first push
        ("false", "1.0.0", "1.0.1", "false"),  # a fork without the secret
    ],
)
def test_a_version_is_published_once_and_not_by_forks(token, old, new, wanted, tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    for version in [old or "0.9.0", new]:
        (tmp_path / "pyproject.toml").write_text(VERSION.format(version))
        git("add", ".")
        git("commit", "-q", "--allow-empty", "-m", version)
    jobs = read(ROOT / ".github" / "workflows" / "publish.yml")["jobs"]
    (script,) = [step["run"] for step in jobs["compare"]["steps"] if "run" in step]
    output = tmp_path / "output"
    variables = {"HAS_TOKEN": token, "BEFORE": "HEAD~1" if old else "none", "GITHUB_OUTPUT": str(output)}
    subprocess.run(["bash", "-eo", "pipefail", "-c", script], cwd=tmp_path, env=os.environ | variables, check=True)
    assert output.read_text() == f"wanted={wanted}\n"
    assert jobs["publish"]["if"] == "needs.compare.outputs.wanted == 'true'"
