"""How another pack keeps GGUF in ComfyUI: a class of tensors for the bytes, layers that expand them, and its patcher.

Written after the behaviour of ComfyUI-GGUF 1.1: tensors that say the shape of their numbers, are not copied, and carry
the patches on them; layers without a weight until one is loaded; a patcher that puts patches on the tensors.
"""

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.utils
import gguf
import torch

PLAIN = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)


class Blocks(torch.Tensor):
    """The bytes of a tensor. tensor_type: of its blocks. tensor_shape: of its numbers."""

    def __new__(cls, data, **_):
        return super().__new__(cls, data)

    def __init__(self, data, *, tensor_type=None, tensor_shape=None, patches=()):
        super().__init__()
        self.tensor_type, self.tensor_shape, self.patches = tensor_type, tensor_shape, list(patches)

    def to(self, *args, **kwargs):
        moved = super().to(*args, **kwargs)
        moved.tensor_type = getattr(self, "tensor_type", None)
        moved.tensor_shape = getattr(self, "tensor_shape", moved.data.shape)
        moved.patches = list(getattr(self, "patches", ()))
        return moved

    def clone(self, *_, **__):
        return self

    def detach(self, *_, **__):
        return self

    @property
    def shape(self):
        return getattr(self, "tensor_shape", None) or self.size()


def is_packed(tensor):
    return tensor is not None and getattr(tensor, "tensor_type", None) not in (None, *PLAIN)


def read(path, rename=lambda name: name):
    """A file's tensors, packed ones as Blocks."""
    weights = {}
    for each in gguf.GGUFReader(path).tensors:
        shape = torch.Size(int(size) for size in reversed(each.shape))
        data = torch.from_numpy(each.data.copy())
        data = data.view(*shape) if each.tensor_type in PLAIN else data
        weights[rename(each.name)] = Blocks(data, tensor_type=each.tensor_type, tensor_shape=shape)
    return weights


class _Layer:
    comfy_cast_weights = True

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        weight = state_dict.get(f"{prefix}weight")
        if not is_packed(weight) and not isinstance(self, torch.nn.Linear):
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        for name in ("weight", "bias"):
            if f"{prefix}{name}" in state_dict:
                setattr(self, name, torch.nn.Parameter(state_dict[f"{prefix}{name}"], requires_grad=False))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not is_packed(self.weight):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        destination[f"{prefix}weight"] = torch.zeros_like(self.weight, device="meta")  # for estimates of memory alone
        if self.bias is not None:
            destination[f"{prefix}bias"] = torch.zeros_like(self.bias, device="meta")

    def _numbers(self, tensor, dtype):
        if tensor is None:
            return None
        if is_packed(tensor):
            expanded = gguf.quants.dequantize(tensor.cpu().numpy(), tensor.tensor_type)
            weight = torch.from_numpy(expanded).to(tensor.device, dtype).reshape(tensor.tensor_shape)
        else:
            weight = torch.Tensor(tensor).to(dtype)
        for patches, key in getattr(tensor, "patches", ()):
            weight = comfy.lora.calculate_weight(patches, weight, key)
        return weight


class Operations(comfy.ops.manual_cast):
    """The host's operations over Blocks."""

    class Linear(_Layer, comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def forward_comfy_cast_weights(self, input):
            weight, bias = self._numbers(self.weight, input.dtype), self._numbers(self.bias, input.dtype)
            return torch.nn.functional.linear(input, weight, bias)

    class Embedding(_Layer, comfy.ops.manual_cast.Embedding):
        bias = None

        def forward_comfy_cast_weights(self, input, out_dtype=None):
            return torch.nn.functional.embedding(input, self._numbers(self.weight, out_dtype or torch.float32))


class Patcher(comfy.model_patcher.ModelPatcher):
    """Patches of packed weights go on the tensors, and are applied as these are expanded."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        weight = comfy.utils.get_attr(self.model, key)
        if key not in self.patches or not is_packed(weight):
            super().patch_weight_to_device(key, device_to, inplace_update)
            return
        patched = weight.to(device_to)
        patched.patches = [(self.patches[key], key)]
        comfy.utils.set_attr_param(self.model, key, patched)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            for parameter in self.model.parameters():
                if is_packed(parameter) and getattr(parameter, "patches", ()):
                    parameter.patches = []
        return super().unpatch_model(device_to, unpatch_weights)

    def load(self, *args, force_patch_weights=False, **kwargs):
        super().load(*args, force_patch_weights=True, **kwargs)

    def clone(self, *args, **kwargs):
        own_class, self.__class__ = self.__class__, Patcher
        twin = super().clone(*args, **kwargs)
        twin.__class__, self.__class__ = Patcher, own_class
        return twin
