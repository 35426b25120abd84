"""python launch.py [--follow] FILE|-m MODULE ...: run a program as `python` would, with three differences.

The current folder comes last on sys.path: in the repository's root, `import nodes` would otherwise give this pack's in
place of ComfyUI's. With --follow the program ends as soon as standard input closes, that is, when the process that
started it is gone, for whatever reason. And garbage is looked for more seldom: a ComfyUI makes millions of objects that
stay while it starts, and going through them again and again took a fifth of that time.
"""

import gc
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

YOUNG_OBJECTS = 50_000  # that are there before garbage is looked for among them


def follow_starter() -> None:
    """End this process, with the group that it heads, when the other end of standard input is gone."""
    while os.read(0, 1):
        pass
    if os.name != "nt" and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main(arguments: list[str]) -> None:
    if arguments[0] == "--follow":
        arguments = arguments[1:]
        threading.Thread(target=follow_starter, daemon=True).start()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    del sys.path[0]  # this file's folder
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.append(os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
