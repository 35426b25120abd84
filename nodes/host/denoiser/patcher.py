"""The host's patcher of a PixArt, which also knows the parts of attention by the names that U-Nets have for them.

PixArt keeps queries, keys and values in one matrix. Nodes that change one of them (UNetSelfAttentionMultiply and its
like) look for `attn1.to_q.weight` in the list of weights, and patch what they find.
"""

import functools

import comfy.model_patcher
import comfy.utils

from ..weights.patcher import PackedWeights, mix_in

PREFIX = "diffusion_model."
PARTS = (".to_q.", ".to_k.", ".to_v.", ".to_out.0.")


BESIDE_WEIGHTS = (".weight_scale", ".comfy_quant")  # in files alone: the host's weights in 8 bits hold them within


class SplitNames(PackedWeights):
    """Mixed into one of the host's patchers: parts of weights have names of their own, under which they are patched."""

    _wholes_alone = False

    def model_state_dict(self, filter_prefix=None):
        """The weights by their names. All of them, when asked for without a prefix, stand there under the parts' too.

        A part's value is the whole weight that it is a part of.
        """
        weights = super().model_state_dict(filter_prefix)
        if self._wholes_alone:
            return {name: weight for name, weight in weights.items() if not name.endswith(BESIDE_WEIGHTS)}
        if filter_prefix is not None:
            return weights
        wholes = {name: _whole(place) for name, place in self._parts().items()}
        return {**weights, **{name: weights[whole] for name, whole in wholes.items() if whole in weights}}

    def get_key_patches(self, filter_prefix=None):
        """What merges and files read: every weight once."""
        self._wholes_alone = True
        try:
            return super().get_key_patches(filter_prefix)
        finally:
            self._wholes_alone = False

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        """Adds patches of weights, of slices, or of parts by name. Returns those that fit."""
        parts = self._parts()
        places = {key: parts.get(key, key) for key in patches}
        fitting = set(
            super().add_patches({places[key]: patch for key, patch in patches.items()}, strength_patch, strength_model)
        )
        return [key for key, place in places.items() if place in fitting]

    def _parts(self):
        return _parts_of(self.model.pixart_config.depth, self.model.pixart_config.hidden_size)


@functools.cache
def _parts_of(depth, hidden_size):
    """Names of parts -> the weight, or (the weight, (dimension, start, length))."""
    names = comfy.utils.pixart_to_diffusers({"depth": depth, "hidden_size": hidden_size}, output_prefix=PREFIX)
    return {f"{PREFIX}{name}": place for name, place in names.items() if any(part in name for part in PARTS)}


def _whole(place):
    return place if isinstance(place, str) else place[0]


def make_named(model, load_device, offload_device, disable_dynamic: bool):
    """The host's patcher of a model, of the class that it uses now, with names for the parts of attention."""
    patchers = comfy.model_patcher
    chosen = patchers.ModelPatcher if disable_dynamic else getattr(patchers, "CoreModelPatcher", patchers.ModelPatcher)
    return name_parts(chosen(model, load_device=load_device, offload_device=offload_device))


def name_parts(patcher):
    """The same patcher, of a class that SplitNames is mixed into."""
    return mix_in(patcher, SplitNames)
