"""SimpleTuner's configuration: its config.json, or the config.env of earlier versions."""

import re
from collections.abc import Mapping

from .fields import Imported, choose, epochs, number, only, read_fields, refuse, to, to_run, whole, yes

DTYPES = {"bf16": "bf16", "fp16": "fp16", "no": "fp32", "fp32": "fp32"}
OPTIMIZERS = {
    **{"adamw_bf16": "adamw", "optimi-adamw": "adamw", "torch-adamw": "adamw", "bnb-adamw8bit": "adamw8bit"},
    **{"optimi-lion": "lion", "bnb-lion": "lion", "prodigy": "prodigy", "came": "came", "adafactor": "adafactor"},
    **{"adamw_schedulefree": "schedulefree", "adamw_8bit": "adamw8bit", "adamw": "adamw"},
}
BASES = {
    **{"no_change": "same", "int8-quanto": "int8", "int8-torchao": "int8", "nf4-bnb": "nf4"},
    **{"fp8-quanto": "fp8", "fp8-torchao": "fp8"},
}
# The names of config.env that are not those of config.json in capitals.
ENVIRONMENT = {
    **{"MODEL_NAME": "pretrained_model_name_or_path", "MAX_NUM_STEPS": "max_train_steps"},
    **{"NUM_EPOCHS": "num_train_epochs", "CHECKPOINTING_LIMIT": "checkpoints_total_limit"},
    **{"LR_SCHEDULE": "lr_scheduler", "MIN_SNR_GAMMA": "snr_gamma", "TRAINING_SEED": "seed"},
    **{"USE_GRADIENT_CHECKPOINTING": "gradient_checkpointing", "DATALOADER_CONFIG": "data_backend_config"},
    **{"RESUME_CHECKPOINT": "resume_from_checkpoint", "TRAINER_EXTRA_ARGS": "", "DEBUG_EXTRA_ARGS": ""},
}
_LINE = re.compile(r"\s*(?:export\s+)?([A-Z][A-Z0-9_]*)=(.*)")


def parse_environment(text: str) -> dict:
    """The fields of a config.env, without comments and what the shell would compute."""
    given = {}
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            continue
        value = found[2].strip()
        quoted = re.match(r"'([^']*)'|\"([^\"]*)\"", value)
        value = (quoted[1] or quoted[2] or "") if quoted else value.partition(" #")[0].strip()
        name = ENVIRONMENT.get(found[1], found[1].lower())
        if name and "$" not in value:
            given[name] = value
    if yes(given.pop("pixart_sigma", False)):
        given["model_family"] = "pixart_sigma"
    return given


def _kind(value, given, found):
    if str(given.get("model_family", "")) not in ("pixart_sigma", "pixart", "pixart_alpha"):
        refuse("model_family", given.get("model_family"), "pixart_sigma")
    kind = {"lora": "lora", "full": "full"}.get(str(value)) or refuse("model_type", value, "lora or full")
    if yes(given.get("controlnet")):
        kind = "controlnet" if kind == "full" else refuse("controlnet", True, "model_type full with it")
    found.settings["kind"] = kind


def _lora_type(value, given, found):
    if str(value).lower() == "lycoris":
        refuse("lora_type", value, "standard, or the fields of its lycoris_config by hand (adapter, rank, alpha)")


def _optimizer(value, given, found):
    choose("optimizer", "optimizer", OPTIMIZERS)(value, given, found)
    if value == "adamw_bf16":
        found.notes.append("adamw_bf16 keeps weights in bf16: here adamw, with what is trained in fp32")


def _schedule(value, given, found):
    choices = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine", "linear": "linear"}
    choose("lr_scheduler", "schedule", choices)(value, given, found)


def _average(value, given, found):
    if yes(value):
        found.settings["ema_decay"] = number(given.get("ema_decay", 0.995))


def _min_snr(value, _given, found):
    if value and number(value):
        found.settings |= {"weighting": "min_snr", "min_snr_gamma": number(value)}


def _noise_offset(value, given, found):
    if yes(value):
        found.settings["noise_offset"] = number(given.get("noise_offset", 0.1))


def _prompt(value, _given, found):
    if value:
        found.run["prompts"] = (str(value),)


def _log(value, _given, found):
    found.settings |= {"wandb": value in ("wandb", "all"), "tensorboard": value in ("tensorboard", "all")}


def _hub(value, _given, found):
    if yes(value):
        found.notes.append("nothing is uploaded unless `train --upload REPOSITORY` is asked for")


READERS = {
    "model_type": _kind,
    "pretrained_model_name_or_path": to_run("model"),
    "output_dir": to_run("output"),
    "init_lora": to_run("start_from"),
    "lora_type": _lora_type,
    "lora_rank": to("rank", whole),
    "lora_alpha": to("alpha", number),
    "lora_dropout": to("dropout", number),
    "use_dora": to("dora", yes),
    "learning_rate": to("learning_rate", number),
    "optimizer": _optimizer,
    "adam_weight_decay": to("weight_decay", number),
    "lr_scheduler": _schedule,
    "lr_warmup_steps": to("warmup_steps", whole),
    "max_train_steps": lambda value, given, found: found.settings.update(steps=whole(value)) if whole(value) else None,
    "num_train_epochs": lambda value, given, found: epochs(whole(value), given, found),
    "train_batch_size": to("batch_size", whole),
    "gradient_accumulation_steps": to("accumulation", whole),
    "gradient_checkpointing": to("checkpointing", yes),
    "mixed_precision": choose("mixed_precision", "dtype", DTYPES),
    "base_model_precision": choose("base_model_precision", "base_dtype", BASES),
    "max_grad_norm": to("clip_norm", number),
    "seed": to("seed", whole),
    "use_ema": _average,
    "snr_gamma": _min_snr,
    "offset_noise": _noise_offset,
    "caption_dropout_probability": to("caption_dropout", number),
    "checkpointing_steps": to("checkpoint_every", whole),
    "checkpoints_total_limit": to("keep_last", whole),
    "validation_steps": to("sample_every", whole),
    "validation_num_inference_steps": to("sample_steps", whole),
    "validation_guidance": to("sample_guidance", number),
    "validation_seed": to("sample_seed", whole),
    "validation_prompt": _prompt,
    "report_to": _log,
    "push_to_hub": _hub,
    "loss_type": only("loss_type", "l2", "mse"),
    "prediction_type": only("prediction_type", "epsilon"),
    "rescale_betas_zero_snr": only("rescale_betas_zero_snr", False),
    "input_perturbation": only("input_perturbation", 0, 0.0),
    "layer_freeze_strategy": only("layer_freeze_strategy", "none"),
}
IDLE = frozenset(
    {
        "model_family",
        "controlnet",
        "ema_decay",
        "noise_offset",
        "lycoris_config",
        "tracker_project_name",
        "hub_model_id",
    }
    | {"tracker_run_name", "num_eval_images", "quantize_via", "vae_batch_size", "resume_from_checkpoint"}
    | {"disable_bucket_pruning", "push_checkpoints_to_hub", "flow_schedule_shift", "metadata_update_interval"}
    | {"max_workers", "read_batch_size", "write_batch_size", "image_processing_batch_size", "aws_max_pool_connections"}
    | {"torch_num_threads", "allow_tf32", "tokenizers_parallelism", "training_num_processes", "hub_model_name"}
    | {"training_num_machines", "training_dynamo_backend", "minimum_resolution", "validation_torch_compile"}
)


def read(given: Mapping) -> Imported:
    """What corresponds. Raises ValueError naming a field that means another training."""
    return read_fields({name.lstrip("-"): value for name, value in given.items()}, READERS, IDLE)
