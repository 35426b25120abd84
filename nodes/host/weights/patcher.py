"""The host's patcher over weights in GGUF's blocks: it saves numbers, and hooks change weights that are packed."""

import contextlib
import functools

import comfy.utils

from .packed import packed_layers


class PackedWeights:
    """Mixed into one of the host's patchers. It changes nothing for a model whose weights are numbers.

    The host changes a weight for a hook in place, where packed bytes have no room for the numbers: here the parameter
    is exchanged instead, and put back.
    """

    def clone(self, *args, **kwargs):
        """A twin that knows as much, where the host gives one of another class: without dynamic memory."""
        return mix_in(super().clone(*args, **kwargs), self.mixin)

    def model_state_dict_for_saving(self, model=None, prefix=""):
        """The weights as numbers, with the patches on them: for the host's own nodes that save."""
        packed = [layer for layer in packed_layers(self.model) if layer.is_packed()]
        with _taken_as_they_are(packed):
            weights = super().model_state_dict_for_saving(model, prefix)
        for name in weights:
            layer = self._packed_layer(f"{prefix}{name}")
            if layer is not None and layer.is_packed():
                weights[name] = self._numbers_of(f"{prefix}{name}", layer)
        return weights

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        """Changes one weight by hooks; those that compare with the model's own weight are given its numbers."""
        if self._packed_layer(key) is not None:
            self._release(key)
            if key in (original_weights or {}):
                (weight, convert), *patches = original_weights[key]
                original_weights[key] = [(convert(weight), convert), *patches]
        super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter):
        """Takes a weight that hooks have changed before."""
        layer = self._packed_layer(key)
        if layer is None:
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)
            return
        self._release(key)
        self.hook_backup.setdefault(key, (layer.weight, layer.weight.device))
        numbers, device = cached_weights[key]
        layer.set_weight(numbers.to(device))

    def unpatch_hooks(self, whitelist_keys_set=None):
        """Puts back what hooks have changed. whitelist_keys_set: the keys of it; None or empty for all."""
        for key in list(self.hook_backup):
            if self._packed_layer(key) is not None and (not whitelist_keys_set or key in whitelist_keys_set):
                weight, device = self.hook_backup.pop(key)
                comfy.utils.set_attr_param(self.model, key, weight.to(device))
        super().unpatch_hooks(whitelist_keys_set)

    def _packed_layer(self, key):
        """The layer whose weight this is, where the file had it in blocks."""
        place, _, name = key.rpartition(".")
        layer = comfy.utils.get_attr(self.model, place) if name == "weight" else None
        return layer if getattr(layer, "packing", None) is not None else None

    def _release(self, key):
        """Lets go of pinned memory before the parameter in it is exchanged."""
        if key in getattr(self, "pinned", ()):
            self.unpin_weight(key)

    def _numbers_of(self, key, layer):
        if key not in self.patches:
            return layer.set_weight(layer.convert_weight(layer.weight), return_weight=True).cpu()
        return self.patch_weight_to_device(key, device_to=self.load_device, return_weight=True).cpu()


@contextlib.contextmanager
def _taken_as_they_are(layers):
    """By the host, which would make parameters that can have gradients of weights that it still has to patch."""
    before = [(layer, getattr(layer, "comfy_patched_weights", False)) for layer in layers]
    try:
        for layer, _ in before:
            layer.comfy_patched_weights = True
        yield
    finally:
        for layer, patched in before:
            layer.comfy_patched_weights = patched


def know_packed_weights(patcher):
    """The same patcher, of a class that PackedWeights is mixed into."""
    return mix_in(patcher, PackedWeights)


def mix_in(patcher, mixin: type):
    """The same patcher, of a class that mixin, which is PackedWeights or made of it, stands in front of."""
    if not isinstance(patcher, mixin):
        patcher.__class__ = _mixed(mixin, type(patcher))
    return patcher


@functools.cache
def _mixed(mixin, chosen):
    return type(f"{mixin.__name__}{chosen.__name__}", (mixin, chosen), {"mixin": mixin})
