"""One process or many: what the loop asks of them, by PyTorch alone or by Accelerate (DDP and FSDP2)."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..quoting import shorten
from .settings import MATCHED, TrainingSettings

_SHARDED_OPTIMIZERS = ("adamw", "lion")  # the others' states are not one number for each weight


class SingleProcess:
    """The loop alone on one device; also the interface of AcceleratedProcesses."""

    world_size, rank, is_sharded = 1, 0, False

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def prepare(self, objective: nn.Module, make: Callable[[], torch.optim.Optimizer]) -> tuple[Callable, Any]:
        """(what to call in place of the objective, its optimiser)."""
        return objective, make()

    def accumulating(self, prepared: Callable, is_last: bool) -> contextlib.AbstractContextManager:
        """Within it gradients are summed over processes only in the last forward pass of a step."""
        return contextlib.nullcontext()

    def release(self, prepared: Callable) -> None:
        """Let go of weights that were made whole in a forward pass and still are: they do not follow their shards."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes."""
        return values

    def wait(self) -> None:
        """Until all processes are here."""


class AcceleratedProcesses(SingleProcess):
    """As `accelerate launch` or torchrun set them up. Raises ValueError for what cannot be sharded."""

    def __init__(self, settings: TrainingSettings):
        try:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs, DistributedType
        except ImportError as error:
            raise ValueError(
                "Accelerate is not installed: got none, expected the package accelerate to train outside a graph. "
                "Install it with pip install accelerate."
            ) from error
        # Precision is the loop's affair, so that all kinds of processes compute alike.
        # Buffers never change, and gradients need no second copy.
        options = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[options])
        _shard_on_cpu(self.accelerator.state)
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.is_sharded = self.accelerator.distributed_type == DistributedType.FSDP
        _check_together(settings, self.world_size, self.is_sharded)
        if self.is_sharded:
            _check_sharded(settings, self.accelerator.is_fsdp2)
            # Accelerate's loading in one process knows no buffers; here every process has loaded the weights.
            self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False

    def prepare(self, objective, make):
        prepared, optimizer = self.accelerator.prepare(objective, make())
        if self.is_sharded:
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(prepared, "within")
        return prepared, optimizer.optimizer

    def accumulating(self, prepared, is_last):
        return contextlib.nullcontext() if is_last else self.accelerator.no_sync(prepared)

    def release(self, prepared):
        if self.is_sharded:
            from torch.distributed.fsdp import FSDPModule

            for module in prepared.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def mean(self, values):
        return self.accelerator.reduce(values, reduction="mean")

    def wait(self):
        self.accelerator.wait_for_everyone()


def _shard_on_cpu(state) -> None:
    """Let an AcceleratorState shard on the CPU as on GPUs, where Accelerate would give each process a copy."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

    if state.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        state.fsdp_plugin, state.distributed_type = FullyShardedDataParallelPlugin(), DistributedType.FSDP


def _check_together(settings: TrainingSettings, world_size: int, is_sharded: bool) -> None:
    if world_size > 1 and (settings.gradient_release or (settings.offload_optimizer and is_sharded)):
        name = "gradient_release" if settings.gradient_release else "offload_optimizer with FSDP"
        raise ValueError(
            f"Only for one process: got {name} in {world_size}, expected 1, since gradients are summed up over all "
            f"before a step. Turn it off; FSDP shares out gradients and states itself."
        )


def _check_sharded(settings: TrainingSettings, is_second: bool) -> None:
    if not is_second:
        raise ValueError(
            "FSDP of the first version: got fsdp_version 1, expected 2. Launch with --fsdp_version 2 "
            "--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_transformer_layer_cls_to_wrap PixArtBlock."
        )
    if settings.optimizer not in _SHARDED_OPTIMIZERS:
        raise ValueError(
            f"Optimiser cannot be sharded: got {shorten(settings.optimizer)}, expected "
            f"{' or '.join(_SHARDED_OPTIMIZERS)}. Choose one of them, or train with DDP."
        )
    if settings.kind in MATCHED:
        raise ValueError(
            f"Cannot be sharded: got kind {shorten(settings.kind)} with FSDP, expected DDP, since its networks have "
            f"weights in common. Launch without FSDP."
        )
    if settings.dtype == "fp16":
        raise ValueError(
            "fp16 cannot be sharded: got dtype fp16 with FSDP, expected bf16 or fp32, which need no loss scale. "
            "Set dtype to bf16."
        )


def whole(value: Any) -> Any:
    """A nested state with every sharded tensor made whole, and every tensor on the CPU as a copy of its own."""
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [whole(inner) for inner in value]
    if isinstance(value, Tensor):
        value = value.detach()
        return (value.full_tensor() if hasattr(value, "full_tensor") else value).to("cpu", copy=True)
    return value


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor on the device of `target` and sharded as it is."""
    value = value.to(target.device)
    if not hasattr(target, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, target.device_mesh, target.placements)
