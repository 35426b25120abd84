"""Watches for what makes a program wait for its GPU, without one: see `watch_steps`."""

import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pixart_pack.samplers import contract

ROOT = Path(__file__).resolve().parent.parent
# Their results have a size or a value that Python asks for; `lift_fresh` brings numbers of Python's to a tensor.
WAITING = frozenset(
    ["item", "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"]
    + ["unique_consecutive", "lift_fresh"]
)


class Watch(TorchDispatchMode):
    """Notes each operation that has the device waited for: the pack's own in `found`, and others' in `others`.

    As (name, file:line). Operations of PyTorch's own code count as those of its caller.
    """

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.others: list[tuple[str, str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in WAITING or _reads_mask(name, args) or _crosses(name, args, kwargs):
            path, line = _caller()
            if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests"):
                self.found.append((name, f"{path.relative_to(ROOT).as_posix()}:{line}"))
            else:
                self.others.append((name, f"{path}:{line}"))
        return function(*args, **kwargs)


def _reads_mask(name, args) -> bool:
    """Whether numbers are picked by a mask, which takes counting them."""
    picks = args[1] if name in ("index", "index_put", "index_put_") else ()
    return any(pick is not None and pick.dtype in (torch.bool, torch.uint8) for pick in picks)


def _crosses(name, args, kwargs) -> bool:
    """Whether numbers go from one device to another, waited for."""
    if name == "_to_copy":
        target, waits = kwargs.get("device"), not kwargs.get("non_blocking")
        return target is not None and waits and torch.device(target).type != args[0].device.type
    return name == "copy_" and args[0].device.type != args[1].device.type and not (args[2:] or [False])[0]


def _caller() -> tuple[Path, int]:
    """The file and line that asked PyTorch for this operation."""
    frame = sys._getframe(1)
    while "torch" in Path(frame.f_code.co_filename).parts or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return Path(frame.f_code.co_filename), frame.f_lineno


def watch_steps(monkeypatch, *modes) -> Watch:
    """From now on all that the pack's solvers do in their steps is watched, under these modes."""
    watch = Watch()

    def watched(count, disable=None):
        for mode in (*modes, watch):
            mode.__enter__()
        try:
            yield from range(count)
        finally:
            for mode in (watch, *reversed(modes)):
                mode.__exit__(None, None, None)

    monkeypatch.setattr(contract, "trange", watched)
    return watch
