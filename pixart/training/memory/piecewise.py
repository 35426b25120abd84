"""An optimiser's step made weight by weight: in the backward pass, so that no two gradients are there at a time, and
with the optimiser's state on the CPU in between.

Source: LOMO, arXiv 2306.09782, section 3.1, with an optimiser that has a state.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class Piecewise:
    """Makes an optimiser's steps for one weight after the other; the result is that of its own step, bit for bit.

    is_released: each step is made in the backward pass, as soon as the weight's gradient is whole, which is then let
    go of. is_offloaded: the states wait on the CPU, pinned where there is a GPU.
    The optimiser has to treat each weight for itself (see settings.PIECEWISE).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], is_released: bool, is_offloaded: bool
    ):
        self.optimizer, self.parameters = optimizer, list(parameters)
        self.is_released, self.is_offloaded = is_released, is_offloaded
        groups = enumerate(optimizer.param_groups)  # by number, since those that are loaded are others
        self._groups = {id(each): number for number, group in groups for each in group["params"]}
        self._squares: Tensor | None = None
        if is_released:
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._release)
        self.put_away()

    def step(self) -> None:
        """Make the step of all weights that have a gradient; those stay."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                self._step(parameter)

    def take_norm(self, device: torch.device) -> Tensor:
        """The norm of all gradients that were let go of since the last time; () float32."""
        squares, self._squares = self._squares, None
        return torch.zeros((), device=device) if squares is None else squares.sqrt()

    def put_away(self) -> None:
        """Move all states to the CPU, where they are to be; after they were loaded."""
        if self.is_offloaded:
            for parameter in self.parameters:
                self._put_away(parameter)

    def _release(self, parameter: Tensor) -> None:
        square = parameter.grad.float().square().sum()
        self._squares = square if self._squares is None else self._squares + square
        self._step(parameter)
        parameter.grad = None

    def _step(self, parameter: Tensor) -> None:
        groups = self.optimizer.param_groups
        listed = [group["params"] for group in groups]
        for number, group in enumerate(groups):
            group["params"] = [parameter] if number == self._groups[id(parameter)] else []
        try:
            self._fetch(parameter)
            self.optimizer.step()
            self._put_away(parameter)
        finally:
            for group, parameters in zip(groups, listed, strict=True):
                group["params"] = parameters

    def _fetch(self, parameter: Tensor) -> None:
        if not self.is_offloaded:
            return
        state = self.optimizer.state.get(parameter, {})
        for name, value in state.items():
            if _is_large(value):
                state[name] = value.to(parameter.device, non_blocking=True)

    def _put_away(self, parameter: Tensor) -> None:
        if not self.is_offloaded:
            return
        state = self.optimizer.state.get(parameter, {})
        for name, value in state.items():
            if _is_large(value) and value.device.type != "cpu":
                kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=_can_pin(value))
                state[name] = kept.copy_(value)


def _can_pin(value: Tensor) -> bool:
    return value.device.type == "cuda" and torch.cuda.is_available()


def _is_large(value: object) -> bool:
    """Whether it is a state of the weights rather than the number of steps, which stays where the optimiser has it."""
    return isinstance(value, Tensor) and value.ndim > 0 and math.prod(value.shape) > 1
