"""Makes the changes of one module out of the tensors that a file has for it, by their roles."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from ..quoting import shorten
from .alphas import LARGEST, PEFT_CONFIG, Settings, matches
from .kinds import Adaptive, Difference, Factor, Hadamard, Kronecker, LowRank
from .names import BARE_WEIGHT, WHOLE, WHOLE_BIAS, Target
from .relative import Butterfly, Frequencies, Generalized, Reflected, Replacement, Rotated, Scaled, Shared, Started

Made = dict[Target, tuple[Factor, set[str]]]  # rows of a parameter -> their change, and the roles that went into it


@dataclass(frozen=True, eq=False)
class Module:
    """What a file holds for one module. target: its weight; name: without its prefix.

    tensors: role -> tensor. shared: the tensors that the file has for all modules, by the last part of their names.
    """

    target: Target
    name: str
    tensors: Mapping[str, torch.Tensor]
    settings: Settings
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def take(self, *roles: str) -> list[torch.Tensor] | None:
        """The tensors of these roles, or None where one is missing."""
        return [self.tensors[role] for role in roles] if self.tensors.keys() >= set(roles) else None

    def require_config(self, kind: str) -> Mapping:
        """PEFT's configuration. Raises ValueError for a kind that cannot be read without."""
        if not self.settings.peft:
            raise ValueError(
                f"{kind} without its configuration: got no {PEFT_CONFIG} for {shorten(self.name)}, expected it beside "
                f"the file, since the tensors do not say all. Put the file back into the folder that PEFT saved."
            )
        return self.settings.peft


def build(module: Module) -> Made:
    """The changes that a module's tensors make, of its weight and its bias; {} when they are incomplete.

    Raises ValueError for a kind that needs PEFT's configuration where there is none.
    """
    made: Made = {}
    bias = module.target.bias
    for role, kind in (("diff_b", Difference), ("b_norm", Difference), (WHOLE_BIAS, Replacement)):
        if role in module.tensors:
            made[bias] = kind(module.tensors[role]), {role}
    for builder in _BUILDERS:
        found = builder(module)
        if found is not None:
            factor, roles = found
            made[module.target] = _with_magnitude(factor, module.tensors), roles & module.tensors.keys()
            break
    weight = made.get(module.target, (None,))[0]
    if isinstance(weight, LowRank) and "up_bias" in module.tensors:
        made[bias] = Difference(module.tensors["up_bias"]), {"up_bias"}
    if isinstance(weight, Scaled) and "ia3_l" in module.tensors and weight.values.shape[-1] == 1:
        made[bias] = Scaled(weight.values.flatten()), {"ia3_l"}
    return made


def _low_rank(module: Module):
    taken = module.take("down", "up")
    if taken is None:
        return None
    return LowRank(*taken, module.tensors.get("mid"), alpha=_alpha(module)), {"down", "up", "mid"} | _COMMON


def _adaptive(module: Module):
    roles = ("adaptive_down", "adaptive_up", "values")
    taken = module.take(*roles)
    if taken is None:
        return None
    down, up, values = taken
    if not values.numel():  # all of its singular values were pruned
        down, up, values = down.new_zeros(1, down.shape[1]), up.new_zeros(up.shape[0], 1), values.new_ones(1, 1)
    if values.shape != (down.shape[0], 1):
        return None
    return Adaptive(down.float() * values.float(), up, alpha=_alpha(module)), {*roles, "alpha"}


def _hadamard(module: Module):
    given = _parts(module, "hada_")
    if not {"w1_a", "w1_b", "w2_a", "w2_b"} <= given.keys():
        return None
    return Hadamard(**given, alpha=_alpha(module)), {f"hada_{part}" for part in given} | _COMMON


def _kronecker(module: Module):
    given = _parts(module, "lokr_")
    if not all(side in given or {f"{side}_a", f"{side}_b"} <= given.keys() for side in ("w1", "w2")):
        return None
    return Kronecker(**given, alpha=_alpha(module)), {f"lokr_{part}" for part in given} | _COMMON


def _difference(module: Module):
    for role, kind in (("diff", Difference), ("w_norm", Difference), (WHOLE, Replacement)):
        if role in module.tensors:
            return kind(module.tensors[role]), {role}
    return None


def _ia3(module: Module):
    """PEFT's are of rows, (rows, 1), or of columns, (1, columns); a convolution's shape does not say which."""
    if "ia3_l" not in module.tensors:
        return None
    values = module.tensors["ia3_l"]
    if values.ndim > 2:
        names = module.require_config("IA3 of a convolution").get("feedforward_modules")
        names = [names] if isinstance(names, str) else names if isinstance(names, list) else []
        by_columns = any(matches(str(name), module.name) for name in names)
        values = values.reshape((1, -1) if by_columns else (-1, 1))
    return Scaled(values), {"ia3_l"}


def _lycoris_ia3(module: Module):
    taken = module.take(BARE_WEIGHT, "on_input")
    if taken is None:
        return None
    values, on_input = taken
    return Scaled((values.float() + 1).reshape((1, -1) if on_input.any() else (-1, 1))), {BARE_WEIGHT, "on_input"}


def _lycoris_oft(module: Module):
    """LyCORIS' rotations of rows; its "alpha" is the bound of the rotation for each row."""
    if "oft_blocks" not in module.tensors:
        return None
    blocks = module.tensors["oft_blocks"].float()
    lengths = module.tensors.get("rescale")
    lengths = None if lengths is None else lengths.flatten()
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        return None
    skew = blocks - blocks.mT
    bound = (_alpha(module) or 0.0) * math.prod(blocks.shape[-3:-1])
    norm = skew.norm() + 1e-8
    if 0 < bound < norm:
        skew = skew * bound / norm
    identity = torch.eye(blocks.shape[-1], device=blocks.device)
    rotations = (identity + skew) @ torch.linalg.inv(identity - skew)
    roles = {"oft_blocks", "rescale", "alpha"}
    if blocks.ndim == 4:
        return Butterfly(rotations, lengths), roles
    return Rotated(rotations.mT, by_rows=True, lengths=lengths), roles


def _peft_oft(module: Module):
    """PEFT's rotations of columns: the upper triangles of skew matrices."""
    if "oft_R" not in module.tensors:
        return None
    config, packed = module.require_config("OFT"), module.tensors["oft_R"].float()
    size = round((1 + math.sqrt(1 + 8 * packed.shape[-1])) / 2)
    if packed.ndim != 2 or size * (size - 1) // 2 != packed.shape[-1]:
        return None
    skew = packed.new_zeros(packed.shape[0], size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = packed
    skew = skew - skew.mT
    if config.get("coft") is True:
        largest = _bounded(config.get("eps", 6e-5)) / math.sqrt(packed.shape[0])
        skew = skew * (largest / skew.norm(dim=(1, 2), keepdim=True).clamp_min(largest))
    if config.get("use_cayley_neumann", True):
        matrices = _neumann(skew, int(_bounded(config.get("num_cayley_neumann_terms", 5), 100)))
    else:
        matrices = _cayley(skew)
    return Rotated(matrices), {"oft_R"}


def _peft_boft(module: Module):
    taken = module.take("boft_R", "boft_s")
    if taken is None:
        return None
    blocks, lengths = taken
    if blocks.ndim != 4 or blocks.shape[-1] != blocks.shape[-2]:
        return None
    if blocks.shape[0] != 1:
        raise ValueError(
            f"BOFT of several stages: got {blocks.shape[0]} butterfly factors for {shorten(module.name)}, expected "
            f"one. Merge it into the model with PEFT and its CUDA extension, and load that model."
        )
    skew = (blocks[0].float() - blocks[0].float().mT) / 2
    return Rotated(_cayley(skew), lengths=lengths.flatten()), {"boft_R", "boft_s"}


def _hra(module: Module):
    if "hra_u" not in module.tensors:
        return None
    normals = module.tensors["hra_u"].float()
    if module.require_config("HRA").get("apply_GS") is True:
        normals = torch.linalg.qr(normals).Q
    return Reflected(normals), {"hra_u"}


def _vera(module: Module):
    taken = module.take("vera_lambda_d", "vera_lambda_b")
    if taken is None:
        return None
    if not {"vera_A", "vera_B"} <= module.shared.keys():
        raise ValueError(
            f"VeRA without its projections: got no 'vera_A' and 'vera_B' in the file of {shorten(module.name)}, "
            f"expected both. Save it with save_projection=True."
        )
    shared = module.shared["vera_A"], module.shared["vera_B"]
    return Shared(*shared, *taken), {"vera_lambda_d", "vera_lambda_b"}


def _fourier(module: Module):
    if "fourierft_spectrum" not in module.tensors:
        return None
    config = module.require_config("FourierFT")
    seed, scaling = config.get("random_loc_seed", 777), config.get("scaling", 150.0)
    return Frequencies(module.tensors["fourierft_spectrum"], int(_bounded(seed)), _bounded(scaling)), {
        "fourierft_spectrum"
    }


def _tlora(module: Module):
    roles = ("q_layer", "p_layer", "lambda_layer")
    taken = module.take(*roles)
    if taken is None:
        return None
    down, up, values = taken
    return Started(down, up, values.flatten(), module.target, alpha=_alpha(module)), {*roles, "alpha"}


def _glora(module: Module):
    taken = module.take("a1", "a2", "b1", "b2")
    return None if taken is None else (Generalized(*taken, alpha=_alpha(module)), {"a1", "a2", "b1", "b2", "alpha"})


_COMMON = {"alpha", "magnitude", "dora_scale"}
_BUILDERS: tuple[Callable[[Module], tuple[Factor, set[str]] | None], ...] = (
    *(
        _low_rank,
        _adaptive,
        _hadamard,
        _kronecker,
        _ia3,
        _lycoris_ia3,
        _lycoris_oft,
        _peft_oft,
        _peft_boft,
        _hra,
        _vera,
    ),
    *(_fourier, _tlora, _glora, _difference),
)


def _parts(module: Module, start: str) -> dict[str, torch.Tensor]:
    return {role.removeprefix(start): value for role, value in module.tensors.items() if role.startswith(start)}


def _alpha(module: Module) -> float | None:
    return float(module.tensors["alpha"]) if "alpha" in module.tensors else None


def _bounded(value: object, most: float = LARGEST) -> float:
    """A number of a configuration. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < most:
        raise ValueError(
            f"Unusable number in {PEFT_CONFIG}: got {shorten(value)}, expected one below {most:g}. Take the file as "
            f"PEFT saved it."
        )
    return float(value)


def _with_magnitude(factor: Factor, tensors: Mapping[str, torch.Tensor]) -> Factor:
    """PEFT's magnitudes are of rows, in any shape; LyCORIS' are of rows or columns, as their shape shows."""
    if not isinstance(factor, LowRank | Hadamard | Kronecker):
        return factor
    rows = (factor.product_shape or (0,))[0]
    if "magnitude" in tensors:
        return replace(factor, magnitude=tensors["magnitude"].reshape(-1, 1))
    if "dora_scale" in tensors:
        scale = tensors["dora_scale"]
        return replace(factor, magnitude=scale.reshape((-1, 1) if scale.shape[0] == rows else (1, -1)))
    return factor


def _cayley(skew: torch.Tensor) -> torch.Tensor:
    """(I - S) / (I + S), a rotation for a skew matrix."""
    identity = torch.eye(skew.shape[-1], device=skew.device).expand_as(skew)
    return torch.linalg.solve(identity + skew, identity - skew, left=False)


def _neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """(I + S) / (I - S) as PEFT sums it: I + 2 S + 2 S^2 + ... + S^(terms - 1), its last term once."""
    total = torch.eye(skew.shape[-1], device=skew.device).repeat(skew.shape[0], 1, 1)
    power = skew
    for exponent in range(1, terms):
        # Two terms are PEFT's shortest sum beyond the identity, and count S twice.
        total = total + power * (1 if exponent == terms - 1 and terms > 2 else 2)
        power = power @ skew
    return total
