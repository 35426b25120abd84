"""The commands of dev.py and their options."""

import argparse
import contextlib
import errno
import itertools
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from .audit import audit_packages
from .browser import browser_offered
from .checks import lint_commands
from .environment import DEFAULT_HOST, HOSTS, Environment, choose_environment, name_hash, prepare
from .process import LAUNCH, ROOT, DevError, child_environment, foreground, say, spawn, stop_on_signals, tail
from .server import PACK, Server, device_flags, find_kept, link_pack, note_kept, prepare_base
from .tiers import TIERS, Run, closing_lines, exit_code, plan, run_all, table

OUTPUT = ROOT / "output"
PASSING_ON = ("test", "bench", "run", "gpu")  # all behind their own arguments goes to the program


def ready(options: argparse.Namespace) -> Environment:
    environment = choose_environment(options.env, options.comfyui)
    prepare(environment)
    if environment.own_host:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # not even caches are written into the user's ComfyUI
    return environment


def python_path(environment: Environment) -> dict[str, str]:
    """Variables that make the host, the pack (as pixart_pack) and its layers (pixart, samplers) importable."""
    custom_nodes = environment.base() / "custom_nodes"
    link_pack(custom_nodes)
    places = (environment.host, custom_nodes, ROOT)  # the host first, since it and the root both have a `nodes`
    return child_environment(PYTHONPATH=os.pathsep.join(map(str, places)), PIXART_COMFYUI=str(environment.host))


def cache_variables(environment: Environment, root: Path = ROOT) -> dict[str, str]:
    """Variables that lead the caches of pytest, Hypothesis and Ruff out of a clone that cannot be written."""
    if os.access(root, os.W_OK):
        return {}
    caches = environment.lasting / "caches" / name_hash(root)
    cache = f"cache_dir={caches / 'pytest'}"
    pytest_options = f"{os.environ.get('PYTEST_ADDOPTS', '')} -o {shlex.quote(cache)}"
    return {
        "PYTEST_ADDOPTS": pytest_options,
        "RUFF_CACHE_DIR": str(caches / "ruff"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(caches / "hypothesis"),
    }


def demo(options: argparse.Namespace) -> int:
    began = time.perf_counter()
    environment = ready(options)
    set_up_s = time.perf_counter() - began
    base = prepare_base(environment.base(), environment.own_host)

    def server(keep: bool) -> Server:
        flags = [*device_flags(environment.python), "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK]
        output = OUTPUT if keep else None
        return Server(
            environment.python, environment.host, base, port=options.port, flags=flags, output=output, keep=keep
        )

    if not options.port and (kept := find_kept(base, server(keep=True))):
        url = f"http://127.0.0.1:{kept['port']}"
        say(f"Taking the ComfyUI that runs at {url}. {how_to_stop(kept['pid'])}")
        command, variables = client_of(url, environment, options)
        return foreground(command, env=variables)
    with server(options.keep_running) as started:
        say(f"Starting ComfyUI at {started.url} ...")
        began = time.perf_counter()
        started.start()
        say(f"Set-up {set_up_s:.1f} s, server start {time.perf_counter() - began:.1f} s")
        command, variables = client_of(started.url, environment, options)
        if foreground(command, env=variables):
            started.check()
            raise DevError("", started.log)  # it has said what is wrong
    if options.keep_running:
        note_kept(base, started)
        say(f"The server keeps running at {started.url}; the next demo takes it. {how_to_stop(started.process.pid)}")
    return 0


def how_to_stop(pid: int) -> str:
    return f"Stop it with: {'taskkill /T /F /PID' if os.name == 'nt' else 'kill'} {pid}"


def client_of(url: str, environment: Environment, options: argparse.Namespace) -> tuple[list, dict[str, str]]:
    """The program that makes the pictures on the server at `url`, and its variables."""
    command = [environment.python, LAUNCH, "-m", f"{PACK}.demo.pictures", "--url", url, "--output", OUTPUT]
    return [*command, *client_arguments(options)], python_path(environment)


def client_arguments(options: argparse.Namespace) -> list[str]:
    """The options of `demo` that its client takes; those not given are left to the workflow."""
    arguments = []
    for prompt in options.prompt or ():
        arguments += ["--prompt", prompt]
    for name in ("seed", "steps", "guidance", "size"):
        if getattr(options, name) is not None:
            arguments += [f"--{name}", str(getattr(options, name))]
    return arguments + ["--open"] * options.open


def serve(options: argparse.Namespace) -> int:
    environment = ready(options)
    base = prepare_base(environment.base(), environment.own_host)
    flags = device_flags(environment.python)
    with Server(environment.python, environment.host, base, port=options.port, flags=flags, output=OUTPUT) as server:
        say(f"Starting ComfyUI at {server.url} ...")
        server.start()
        say(f"The editor is at {server.url}. Models go into {base / 'models'}. Ctrl-C stops it.")
        with open(server.log, encoding="utf-8", errors="replace") as log:
            while True:
                sys.stdout.write(log.read())
                sys.stdout.flush()
                server.check()
                time.sleep(0.5)


def test(options: argparse.Namespace) -> int:
    runs = plan(options.tier, options.rest)
    environment = ready(options)
    shared = child_environment(PIXART_COMFYUI=str(environment.host), **cache_variables(environment))
    offered = browser_offered(environment) if any(each.editor for each in runs) else contextlib.nullcontext({})
    with offered as browser:

        def start(each: Run, variables: dict[str, str]) -> int:
            command = [environment.python, "-m", "pytest", *each.arguments]
            return foreground(command, cwd=ROOT, env={**shared, **browser, **variables})

        def begin(each: Run, variables: dict[str, str], log: Path) -> subprocess.Popen:
            command = [environment.python, "-m", "pytest", *each.arguments]
            with open(log, "wb") as file:
                return spawn(
                    command,
                    cwd=ROOT,
                    env={**shared, **browser, **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )

        outcomes = run_all(runs, start, begin)
    if runs[0].name:  # else pytest's own last line says it
        say("\n".join(["", *(table(outcomes) if options.tier == "cpus" else closing_lines(runs, outcomes))]))
    return exit_code(outcomes, chosen=bool(options.rest))


def lint(options: argparse.Namespace) -> int:
    environment = ready(options)
    commands = lint_commands(environment.python, options.fix)
    variables = child_environment(**cache_variables(environment))
    return max([foreground(command, cwd=ROOT, env=variables) for command in commands])


def docs(options: argparse.Namespace) -> int:
    """Build the site into site/, or show it while its pages are written."""
    environment = ready(options)
    command = ["serve"] if options.serve else ["build", "--strict", "--clean"]
    code = foreground(
        [environment.python, "-m", "mkdocs", *command], cwd=ROOT, env=child_environment(NO_MKDOCS_2_WARNING="1")
    )
    if not code and not options.serve:
        say(f"The site is in {ROOT / 'site'}: open {ROOT / 'site' / 'index.html'}")
    return code


def audit(options: argparse.Namespace) -> int:
    return audit_packages(ready(options).python)


def run(options: argparse.Namespace) -> int:
    if options.rest[:1] in ([], ["-m"]) and len(options.rest) < 2:
        raise DevError("Nothing to run: expected `python dev.py run FILE ...` or `python dev.py run -m MODULE ...`")
    environment = ready(options)
    launch = [LAUNCH] if options.rest[0] == "-m" else []
    return foreground([environment.python, *launch, *options.rest], env=python_path(environment))


def bench(options: argparse.Namespace) -> int:
    options.rest = ["-m", f"{PACK}.benchmarks", *options.rest]
    return run(options)


# How ComfyUI is started for `gpu`: the first makes the pictures that those of the others are held to.
MODES = {
    "cpu": ["--cpu"],
    "gpu": [],
    "lowvram": ["--disable-dynamic-vram", "--lowvram"],
    "novram": ["--novram"],
    "dynamic": ["--enable-dynamic-vram"],
}
GPU_S = 480  # of all parts together; --budget-s says otherwise
CORRECTNESS_SHARE = 0.4  # of that time at most
LEAST_S = 45  # below this no further ComfyUI is started
MODES_ON_CPU = {"cpu": ["--cpu"], "cpu_again": ["--cpu"]}


def gpu(options: argparse.Namespace) -> int:
    """Correctness first, then the pictures of every mode, then speed; a part that fails does not end the others."""
    environment = ready(options)
    program = [environment.python, LAUNCH, "-m", f"{PACK}.benchmarks.gpu", *options.rest]
    variables = python_path(environment)
    if "-h" in options.rest or "--help" in options.rest:
        return foreground(program, env=variables)
    ends = time.monotonic() + budget(options.rest)
    on_cpu = "cpu" in options.rest or "--cpu" in device_flags(environment.python)

    def part(*arguments: str, share: float = 1.0) -> int:
        left_s = max((ends - time.monotonic()) * share, 0)
        return foreground([*program, *arguments, "--budget-s", f"{left_s:.0f}"], env=variables)

    codes = [part("--parts", "correctness", share=CORRECTNESS_SHARE)]
    base = prepare_base(environment.base(), environment.own_host)
    for mode, own_flags in (MODES_ON_CPU if on_cpu else MODES).items():
        if ends - time.monotonic() < LEAST_S:
            say(f"host {mode}: no time was left; run it again to go on")
            continue
        flags = [*own_flags, "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK]
        try:
            with Server(environment.python, environment.host, base, flags=flags) as server:
                server.start()
                codes.append(part("--mode", mode, "--url", server.url))
        except DevError as error:
            say(f"host {mode}: failed: {error}")
            codes.append(1)
    codes.append(part("--parts", "speed"))
    return max(codes)


def budget(arguments: list[str]) -> float:
    """Seconds for all parts of `gpu`: what --budget-s says, or GPU_S."""
    given = [value for flag, value in itertools.pairwise(arguments) if flag == "--budget-s"]
    given += [each.partition("=")[2] for each in arguments if each.startswith("--budget-s=")]
    try:
        return float(given[-1]) if given else GPU_S
    except ValueError:
        raise DevError(f"Not a number of seconds: got --budget-s {given[-1]}, expected one such as 480.") from None


def make_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--env", metavar="DIR", help="the environment's folder (default: in the user's cache folder)")
    common.add_argument("--comfyui", choices=HOSTS, help=f"the host's version (default: {DEFAULT_HOST})")
    parser = argparse.ArgumentParser(
        prog="dev.py",
        description="Makes its environment on first use, then runs the command in it.",
        epilog="COMFYUI_PATH names a ComfyUI of your own to use: its files and models are read and never written, "
        "the Python environment is dev.py's.",
        parents=[common],
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(function, text: str, passed_on: str | None = None) -> argparse.ArgumentParser:
        usage = passed_on and f"dev.py {function.__name__} [--env DIR] [--comfyui VERSION] {passed_on}"
        command = commands.add_parser(function.__name__, help=text, description=text, parents=[common], usage=usage)
        command.set_defaults(function=function)
        return command

    command = add(demo, "make pictures with the built-in model through a real ComfyUI, into output/")
    command.add_argument("--prompt", action="append", metavar="TEXT", help="a caption; may be given several times")
    command.add_argument("--seed", type=int)
    command.add_argument("--steps", type=int)
    command.add_argument("--guidance", type=float)
    command.add_argument("--size", type=size, metavar="WIDTHxHEIGHT", help="in pixels, such as 128x128")
    command.add_argument("--port", type=int, default=0, help="the server's port (default: any free one)")
    command.add_argument("--open", action="store_true", help="show the contact sheet when it is made")
    command.add_argument("--keep-running", action="store_true", help="leave the server running, for the next demo")
    command = add(serve, "start ComfyUI with this pack and its editor; Ctrl-C stops it")
    command.add_argument("--port", type=int, default=8188, help="the server's port (default: 8188)")
    command = add(test, "run the tests", f"[{' | '.join(f'--{tier}' for tier in TIERS)}] [PYTEST ARGUMENTS]")
    tiers = command.add_mutually_exclusive_group()
    for tier, text in TIERS.items():
        tiers.add_argument(f"--{tier}", dest="tier", action="store_const", const=tier, help=text)
    add(bench, "run the benchmarks", "[NAME] [ARGUMENTS]")
    add(gpu, "what the GPU computes, in ComfyUI too, and how fast", "[--device cpu] [--small] [ARGUMENTS]")
    command = add(lint, "check style, formatting, and the files that GitHub reads")
    command.add_argument("--fix", action="store_true", help="mend what can be mended")
    command = add(docs, "build the documentation as a site, into site/")
    command.add_argument("--serve", action="store_true", help="show it at a local address instead, while it is written")
    add(audit, "list known faults of the packages that are installed; asks the package index")
    add(run, "run a program with the pack and the host importable", "FILE|-m MODULE [ARGUMENTS]")
    return parser


def size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected WIDTHxHEIGHT such as 128x128")
    return text


def parse(arguments: list[str]) -> argparse.Namespace:
    own, rest = take_own(arguments)
    passed_on = []
    if rest[:1] and rest[0] in PASSING_ON:
        own_too, passed_on = take_own(rest[1:], TIERS if rest[0] == "test" else ())
        arguments = [*own, rest[0], *own_too]
    # Not set_defaults: a subparser's defaults would overwrite what was given before the command.
    return make_parser().parse_args(arguments, argparse.Namespace(env=None, comfyui=None, tier=None, rest=passed_on))


def take_own(arguments: list[str], further: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Split off the leading options that every command has, and the further ones of this command."""
    flags = "|".join(["-h", "--help", *(f"--{name}" for name in further)])
    count = 0
    while count < len(arguments) and re.match(rf"(--env|--comfyui)(=|$)|({flags})$", arguments[count]):
        count += 2 if arguments[count] in ("--env", "--comfyui") else 1
    return arguments[:count], arguments[count:]


def main(arguments: list[str]) -> int:
    """Run a command; returns the exit code. What fails is said in one line, after the tail of its log."""
    options = parse(arguments)
    stop_on_signals()
    log = None
    try:
        return options.function(options)
    except DevError as error:
        message, log = str(error), error.log
    except OSError as error:
        full = error.errno == errno.ENOSPC
        message = "The disk is full: free some space or choose --env DIR" if full else str(error)
    if log is not None:
        sys.stderr.write(f"The end of {log}:\n{tail(log)}\n")
    if message:  # last, where it is seen
        sys.stderr.write(f"error: {message}\n")
    return 1
