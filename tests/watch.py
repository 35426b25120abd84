"""Watches for what makes a program wait for its GPU, without one: see `watch_steps`."""

import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pixart_pack.samplers import contract

ROOT = Path(__file__).resolve().parent.parent
# Their results have a size or a value that Python asks for; `lift_fresh` brings numbers of Python's to a tensor.
WAITING = frozenset(
    {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "lift_fresh"}
)


class Watch(TorchDispatchMode):
    """Notes in `found` each operation of the pack's own code that has the device waited for: (name, file:line)."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name in WAITING or _reads_mask(name, args) or _crosses(name, args, kwargs):
            place = _place()
            if place is not None:
                self.found.append((name, place))
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


def _place() -> str | None:
    """Where the pack called this operation; None when another program did."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path != Path(__file__):
            inside = path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests")
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}" if inside else None
        frame = frame.f_back
    return None


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
