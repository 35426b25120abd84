"""OneTrainer's configuration, the JSON that its window saves."""

from collections.abc import Mapping

from ...quoting import plain
from .fields import Imported, choose, epochs, number, only, read_fields, refuse, to, to_run, whole, yes

DTYPES = {"bfloat_16": "bf16", "float_16": "fp16", "float_32": "fp32", "tfloat_32": "fp32"}
OPTIMIZERS = {
    **{"adamw": "adamw", "adamw_8bit": "adamw8bit", "came": "came", "prodigy": "prodigy", "lion": "lion"},
    **{"adafactor": "adafactor", "schedule_free_adamw": "schedulefree"},
}


def _optimizer(value, _given, found):
    options = value if isinstance(value, Mapping) else {"optimizer": value}
    choose("optimizer", "optimizer", OPTIMIZERS)(options.get("optimizer", "ADAMW"), {}, found)
    if yes(options.get("relative_step")) and found.settings["optimizer"] == "adafactor":
        refuse("optimizer.relative_step", True, "false, with a learning rate")
    if options.get("weight_decay") is not None:
        found.settings["weight_decay"] = number(options["weight_decay"])


def _method(value, given, found):
    if str(given.get("model_type", "")) not in ("PIXART_ALPHA", "PIXART_SIGMA"):
        refuse("model_type", given.get("model_type"), "PIXART_ALPHA or PIXART_SIGMA")
    choose("training_method", "kind", {"lora": "lora", "fine_tune": "full"})(value, given, found)


def _average(value, given, found):
    if str(value).upper() != "OFF":
        found.settings["ema_decay"] = number(given.get("ema_decay", 0.999))


def _warm_up(value, _given, found):
    steps = number(value)
    if 0 < steps < 1:
        found.notes.append(f"warm-up of {steps:g} of all steps: set warmup_steps")
    else:
        found.settings["warmup_steps"] = int(steps)


def _text_encoder(value, _given, found):
    if isinstance(value, Mapping):
        if yes(value.get("train", False)):
            refuse("text_encoder.train", True, "false: T5 is never trained")
        if value.get("dropout_probability"):
            found.settings["caption_dropout"] = number(value["dropout_probability"])


def _checkpointing(value, _given, found):
    found.settings["checkpointing"] = "off" if str(value).upper() in ("OFF", "FALSE") else "on"
    if "OFFLOADED" in str(value).upper():
        found.notes.append("activations are recomputed and not moved to the CPU")


def _losses(value, given, _found):
    for name in ("mae_strength", "log_cosh_strength", "huber_strength"):
        if name in given and number(given[name]):
            refuse(name, given[name], "0: the loss is the squared error")
    if number(value) != 1:
        refuse("mse_strength", value, "1: the loss is the squared error")


def _bound(value, _given, found):
    if number(value):
        found.notes.append(
            f"vb_loss_strength {number(value):g}: set train_variance to true to learn the variance too; it is off here"
        )


def _weighting(value, given, found):
    choices = {"constant": "none", "min_snr_gamma": "min_snr"}
    choose("loss_weight_fn", "weighting", choices)(value, given, found)
    if found.settings["weighting"] == "min_snr":
        found.settings["min_snr_gamma"] = number(given.get("loss_weight_strength", 5))


READERS = {
    "training_method": _method,
    "base_model_name": to_run("model"),
    "output_model_destination": to_run("file"),
    "lora_model_name": to_run("start_from"),
    "batch_size": to("batch_size", whole),
    "gradient_accumulation_steps": to("accumulation", whole),
    "epochs": epochs,
    "learning_rate": to("learning_rate", number),
    "learning_rate_scheduler": choose(
        "learning_rate_scheduler", "schedule", {"constant": "constant", "linear": "linear", "cosine": "cosine"}
    ),
    "learning_rate_warmup_steps": _warm_up,
    "learning_rate_min_factor": to("floor", number),
    "optimizer": _optimizer,
    "clip_grad_norm": to("clip_norm", number),
    "ema": _average,
    "gradient_checkpointing": _checkpointing,
    "train_dtype": choose("train_dtype", "dtype", DTYPES),
    "output_dtype": choose("output_dtype", "save_dtype", DTYPES),
    "peft_type": choose("peft_type", "adapter", {"lora": "lora", "loha": "loha"}),
    "lora_rank": to("rank", whole),
    "lora_alpha": to("alpha", number),
    "lora_decompose": to("dora", yes),
    "dropout_probability": to("dropout", number),
    "text_encoder": _text_encoder,
    "offset_noise_weight": to("noise_offset", number),
    "perturbation_noise_weight": only("perturbation_noise_weight", 0, 0.0),
    "min_noising_strength": to("timestep_min", lambda value: round(1000 * number(value))),
    "max_noising_strength": to("timestep_max", lambda value: round(1000 * number(value)) - 1),
    "timestep_distribution": only("timestep_distribution", "UNIFORM", "uniform"),
    "mse_strength": _losses,
    "vb_loss_strength": _bound,
    "loss_weight_fn": _weighting,
    "force_v_prediction": only("force_v_prediction", False),
    "rescale_noise_scheduler_to_zero_terminal_snr": only("rescale_noise_scheduler_to_zero_terminal_snr", False),
    "tensorboard": to("tensorboard", yes),
}
IDLE = frozenset(
    {"model_type", "ema_decay", "loss_weight_strength", "mae_strength", "log_cosh_strength", "huber_strength"}
    | {"output_model_format", "cache_dir", "workspace_dir", "debug_dir", "tensorboard_port", "train_device"}
    | {"temp_device", "dataloader_threads", "latent_caching", "clear_cache_before_training", "__version"}
    | {"training_method", "resolution", "concept_file_name", "sample_definition_file_name"}
)


def read(given: Mapping) -> Imported:
    """What corresponds. Raises ValueError naming a field that means another training."""
    found = read_fields(given, READERS, IDLE)
    if "resolution" in given:
        found.notes.append(f"resolution {plain(str(given['resolution']), 60)}: encode the pictures at it")
    return found
