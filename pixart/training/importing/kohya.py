"""kohya's configuration, the TOML of sd-scripts' --config_file."""

from collections.abc import Mapping

from ...quoting import plain
from .fields import Imported, choose, epochs, number, only, read_fields, refuse, to, to_run, whole, yes

DTYPES = {"bf16": "bf16", "fp16": "fp16", "no": "fp32", "float": "fp32"}
OPTIMIZERS = {
    **{"adamw": "adamw", "adamw8bit": "adamw8bit", "lion": "lion", "prodigy": "prodigy", "came": "came"},
    **{"adafactor": "adafactor", "adamwschedulefree": "schedulefree"},
}
ALGORITHMS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "diag-oft": "oft"}


def _pairs(value) -> dict[str, str]:
    """kohya's lists of name=value."""
    listed = value if isinstance(value, list) else str(value or "").split()
    return dict(str(each).split("=", 1) for each in listed if "=" in str(each))


def _network(value, given, found):
    options, settings = _pairs(given.get("network_args")), found.settings
    settings |= {"kind": "lora", "alpha": 1.0}  # theirs where none is given
    if str(value).startswith("lycoris"):
        choose("algo", "adapter", ALGORITHMS)(options.get("algo", "lora"), given, found)
    elif not str(value).startswith("networks.lora"):
        refuse("network_module", value, "networks.lora or lycoris.kohya")
    if yes(options.get("dora_wd")):
        settings["dora"] = True
    if options.get("loraplus_lr_ratio"):
        settings["lora_plus"] = number(options["loraplus_lr_ratio"])
    if int(options.get("factor", -1)) > 0:
        settings["lokr_factor"] = int(options["factor"])
    known = {"algo", "dora_wd", "loraplus_lr_ratio", "factor"}
    found.left += [
        f"network_args {plain(name, 60)}: {plain(text, 60)}" for name, text in options.items() if name not in known
    ]


def _optimizer(value, given, found):
    choose("optimizer_type", "optimizer", OPTIMIZERS)(str(value).rpartition(".")[2], given, found)
    options = _pairs(given.get("optimizer_args"))
    if found.settings["optimizer"] == "adafactor" and yes(options.get("relative_step", "true")):
        refuse("optimizer_args relative_step", "true", "relative_step=False, with a learning rate")
    if "weight_decay" in options:
        found.settings["weight_decay"] = number(options["weight_decay"])
    left = (f"optimizer_args {plain(name, 60)}: {plain(text, 60)}" for name, text in options.items())
    found.left += [each for each in left if not each.startswith(("optimizer_args weight_decay", "optimizer_args rel"))]


def _schedule(value, given, found):
    choices = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear"}
    if value == "cosine_with_restarts" and int(given.get("lr_scheduler_num_cycles") or 1) == 1:
        value = "cosine"
    choose("lr_scheduler", "schedule", choices)(value, given, found)


def _loss(value, given, found):
    choose("loss_type", "loss", {"l2": "mse", "huber": "huber"})(value, given, found)
    if value == "huber":
        if str(given.get("huber_schedule", "snr")) != "constant":
            refuse("huber_schedule", given.get("huber_schedule", "snr"), "constant")
        found.settings["huber_c"] = number(given.get("huber_c", 0.1))


def _min_snr(value, _given, found):
    if number(value):
        found.settings |= {"weighting": "min_snr", "min_snr_gamma": number(value)}


def _log(value, _given, found):
    found.settings |= {"wandb": value in ("wandb", "all"), "tensorboard": value in ("tensorboard", "all")}


READERS = {
    "pretrained_model_name_or_path": to_run("model"),
    "output_dir": to_run("output"),
    "output_name": to_run("name"),
    "network_module": _network,
    "network_weights": to_run("start_from"),
    "network_dim": to("rank", whole),
    "network_alpha": to("alpha", number),
    "network_dropout": to("dropout", number),
    "network_train_text_encoder_only": only("network_train_text_encoder_only", False),
    "learning_rate": to("learning_rate", number),
    "unet_lr": to("learning_rate", number),
    "optimizer_type": _optimizer,
    "lr_scheduler": _schedule,
    "lr_warmup_steps": to("warmup_steps", whole),
    "max_train_steps": to("steps", whole),
    "max_train_epochs": epochs,
    "train_batch_size": to("batch_size", whole),
    "gradient_accumulation_steps": to("accumulation", whole),
    "gradient_checkpointing": to("checkpointing", yes),
    "mixed_precision": choose("mixed_precision", "dtype", DTYPES),
    "save_precision": choose("save_precision", "save_dtype", DTYPES),
    "fp8_base": choose("fp8_base", "base_dtype", {True: "fp8", False: "same"}),
    "max_grad_norm": to("clip_norm", number),
    "seed": to("seed", whole),
    "loss_type": _loss,
    "min_snr_gamma": _min_snr,
    "noise_offset": to("noise_offset", number),
    "min_timestep": to("timestep_min", whole),
    "max_timestep": to("timestep_max", lambda value: whole(value) - 1),
    "prior_loss_weight": to("prior_weight", number),
    "caption_dropout_rate": to("caption_dropout", number),
    "save_every_n_steps": to("checkpoint_every", whole),
    "sample_every_n_steps": to("sample_every", whole),
    "log_with": _log,
    **{
        name: only(name, 0, 0.0, False)
        for name in (
            *("v_parameterization", "zero_terminal_snr", "debiased_estimation_loss", "multires_noise_iterations"),
            *("ip_noise_gamma", "adaptive_noise_scale", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"),
        )
    },
}
IDLE = frozenset(
    {"network_args", "optimizer_args", "huber_c", "huber_schedule", "lr_scheduler_num_cycles", "lr_scheduler_power"}
    | {"cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "max_data_loader_n_workers", "xformers"}
    | {"sdpa", "persistent_data_loader_workers", "save_model_as", "logging_dir", "bucket_reso_steps", "clip_skip"}
    | {"cache_text_encoder_outputs_to_disk", "dynamo_backend", "lowram", "mem_eff_attn", "multires_noise_discount"}
)


def read(given: Mapping) -> Imported:
    """What corresponds. Raises ValueError naming a field that means another training."""
    flat = {}
    for name, value in given.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    found = read_fields(flat, READERS, IDLE)
    found.settings.setdefault("kind", "full")
    return found
