"""In which dtype the host keeps a PixArt's weights, and in which it computes."""

import inspect

import comfy.model_management
import comfy.utils
import torch
from comfy.cli_args import args

from ....pixart.acceleration.processors import has_bf16

WIDE = torch.float32


def choose_dtypes(state_dict, device, supported, dtype=None):
    """(dtype of the weights, dtype of the maths or None for the same). dtype: of the weights, where a user chose it.

    As the host chooses; but what it leaves to float32 on a CPU is computed in bfloat16 where the CPU has it and the
    weights hold no more digits than that. --force-fp32, and float32 as the weights' dtype, keep float32.
    """
    management = comfy.model_management
    held = comfy.utils.weight_dtype(state_dict)
    if dtype is None:
        dtype = management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(state_dict), supported_dtypes=supported, weight_dtype=held
        )
        if dtype == WIDE and held == torch.bfloat16 and not args.fp32_unet and computes_bf16(device):
            dtype = torch.bfloat16
    manual_cast = management.unet_manual_cast(dtype, device, supported)
    narrow = dtype == torch.bfloat16 or dtype.itemsize == 1
    if narrow and manual_cast == WIDE and computes_bf16(device):
        manual_cast = None if dtype == torch.bfloat16 else torch.bfloat16
    return dtype, manual_cast


def computes_bf16(device) -> bool:
    """Whether the host's device is a CPU that has bfloat16, and nobody has forced float32."""
    return comfy.model_management.is_device_cpu(device) and not args.force_fp32 and has_bf16()


def set_inference_dtype(model_config, dtype, manual_cast, device):
    """Set in the host's config the dtypes of weights and maths; hosts before 0.30 do not ask for the device."""
    takes_device = "device" in inspect.signature(model_config.set_inference_dtype).parameters
    model_config.set_inference_dtype(dtype, manual_cast, **({"device": device} if takes_device else {}))
