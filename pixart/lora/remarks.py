"""What a LoRA's configuration says beside its tensors: kinds that are refused, what is missing, what was assumed."""

from collections.abc import Iterable, Mapping

from ..quoting import list_names, shorten
from .alphas import PEFT_CONFIG, Settings
from .by_peft import MERGED
from .kinds import Adaptive, Factor, Hadamard, Kronecker, LowRank
from .names import Target

READ_HERE = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "HRA", "VERA", "FOURIERFT", "LN_TUNING")
# Made of singular vectors of the base's weights, which the file does not hold.
_OF_THE_BASE = ("FROD", "OSF", "PSOFT", "ADAMSS")
# Options of PEFT's LoRA under which its tensors mean something else.
_OTHER_LORAS = (
    *("use_bdlora", "use_qalora", "kasa_config", "monteclora_config", "alora_invocation_tokens", "arrow_config"),
    *("layer_replication", "target_parameters", "megatron_config"),
)
# PEFT's initialisations that take the adapter's first product out of the base, which is then another model.
_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")
# A piece of a key -> the kind that has it and cannot be read without its configuration.
_SIGNS = {
    **{f".{kind.lower()}_": kind for kind in MERGED},
    **{".oft_r": "OFT of PEFT before 0.16", ".poly_": "POLY", ".lily_": "LILY", ".shadow_": "SHADOW"},
    **{".psoft_": "PSOFT", ".osf_": "OSF", ".frod_": "FROD", "prompt_embeddings": "a prompt's embeddings"},
}


def require_readable(config: Mapping) -> None:
    """Raises ValueError, with the remedy that fits, for kinds of PEFT's that are no change of weights in the file."""
    kind = config.get("peft_type") or READ_HERE[0]
    if kind in _OF_THE_BASE:
        raise ValueError(
            f"Adapter made of its base's own weights: got {shorten(kind)}, expected a change that the file holds. "
            f"Merge it into the model with PEFT's merge_and_unload, and load that model."
        )
    if kind not in (*READ_HERE, *MERGED):
        raise ValueError(
            f"Adapter that is no change of weights: got {shorten(kind)}, expected a kind that PEFT can merge, such as "
            f"LORA. Use it in diffusers with PEFT itself."
        )
    others = [name for name in _OTHER_LORAS if config.get(name)]
    if kind == READ_HERE[0] and others:
        raise ValueError(
            f"LoRA of another construction: got {list_names(others)} in {PEFT_CONFIG}, expected a plain LoRA or DoRA. "
            f"Merge it into the model with PEFT's merge_and_unload, and load that model."
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_BASE_CHANGING):
        raise ValueError(
            f"LoRA of a changed base: got init_lora_weights {shorten(start)} in {PEFT_CONFIG}, expected an adapter for "
            f"the model as it is. Save it with PEFT's path_initial_model_for_weight_conversion."
        )


def require_complete(config: Mapping, factors: Mapping[Target, Factor]) -> None:
    """Raises ValueError where tensors are missing without which others mean another change."""
    low_rank = {target: factor for target, factor in factors.items() if isinstance(factor, LowRank)}
    short = next((target for target, factor in low_rank.items() if factor.magnitude is None), None)
    if config.get("use_dora") is True and low_rank and short is not None:
        raise ValueError(
            f"DoRA without its magnitudes: got use_dora in {PEFT_CONFIG} and no 'lora_magnitude_vector' of "
            f"{shorten(short.name)}, expected one for each weight. Choose the complete file."
        )
    short = next((target for target in low_rank if target.bias not in factors), None)
    if config.get("lora_bias") is True and short is not None:
        raise ValueError(
            f"LoRA without its biases: got lora_bias in {PEFT_CONFIG} and no 'lora_B.bias' of {shorten(short.name)}, "
            f"expected one for each weight. Choose the complete file."
        )


def find_missing(config: Mapping, keys: Iterable[str]) -> list[str]:
    """What a configuration names and no key has, in words."""
    keys, missing = list(keys), []
    saved = config.get("modules_to_save")
    for name in saved if isinstance(saved, list) else []:
        if not any(f".{name}." in key for key in keys):
            missing.append(f"the whole module {shorten(name)}")
    bias = config.get("bias", "none")
    if isinstance(bias, str) and bias != "none" and not any(key.endswith(".bias") for key in keys):
        missing.append(f"the trained biases ({shorten(bias)})")
    return missing


def name_kind(keys: Iterable[str]) -> str | None:
    """The kind that keys without a place are of, where it is known to need its configuration."""
    return next((kind for key in keys for sign, kind in _SIGNS.items() if sign in key), None)


def find_assumptions(settings: Settings, sources: Iterable[str], factors: Mapping[Target, Factor]) -> list[str]:
    """What the file does not say and was taken as usual, in words."""
    kinds = {type(factor) for factor in factors.values()}
    assumed = [source for source in sources if "the file has none" in source]
    notes = [f"alpha is {source.partition(',')[0]}" for source in assumed]
    if any("PEFT" in source for source in assumed):
        if kinds & {LowRank, Hadamard, Adaptive}:
            notes.append(f"no rsLoRA: only {PEFT_CONFIG} names it")
        if Kronecker in kinds:
            notes.append(f"LoKr's scale, which only {PEFT_CONFIG} names")
    if settings.peft or settings.chosen is not None:
        return []
    return notes
