"""Configurations of other trainers: what is taken, what is named, and what is refused."""

import json

import pytest

from pixart_pack.pixart.commands import train as train_command
from pixart_pack.pixart.commands.console import run_command
from pixart_pack.pixart.training.importing.files import import_config
from pixart_pack.pixart.training.settings import read_config

ONETRAINER = {
    "base_model_name": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "batch_size": 4,
    "model_type": "PIXART_SIGMA",
    "epochs": 50,
    "learning_rate": 1e-05,
    "learning_rate_scheduler": "COSINE",
    "learning_rate_warmup_steps": 200,
    "optimizer": {"optimizer": "ADAFACTOR", "relative_step": False, "weight_decay": 0.02, "beta1": None},
    "ema": "GPU",
    "ema_decay": 0.99,
    "gradient_checkpointing": "ON",
    "output_model_destination": "models/lora.safetensors",
    "output_model_format": "DIFFUSERS_LORA",
    "resolution": "1024",
    "training_method": "LORA",
    "lora_rank": 8,
    "lora_alpha": 1.0,
    "max_noising_strength": 0.5,
    "loss_weight_fn": "MIN_SNR_GAMMA",
    "loss_weight_strength": 5.0,
    "masked_training": True,
    "vb_loss_strength": 1.0,
    "transformer": {"weight_dtype": "BFLOAT_16"},
    "text_encoder": {"train": False, "dropout_probability": 0.05},
    "train_dtype": "BFLOAT_16",
}
RELATIVE = {"optimizer": "ADAFACTOR", "relative_step": True}
SIMPLETUNER = {
    "--model_family": "pixart_sigma",
    "--model_type": "lora",
    "--lora_type": "standard",
    "--lora_rank": 32,
    "--max_train_steps": 100,
    "--num_train_epochs": 0,
    "--optimizer": "adamw_bf16",
    "--train_batch_size": 3,
    "--base_model_precision": "int8-quanto",
    "--validation_prompt": "a cat",
    "--validation_steps": 50,
    "--push_to_hub": True,
    "--snr_gamma": 5,
    "--report_to": "wandb",
    "--aspect_bucket_rounding": 2,
}
ENVIRONMENT = """# comments
export MODEL_TYPE='full'
export PIXART_SIGMA=true
export FLUX=false
export LEARNING_RATE=8e-7 #@param {type:"number"}
export MAX_NUM_STEPS=30000
export TRAIN_BATCH_SIZE=10
export TRACKER_PROJECT_NAME="${MODEL_TYPE}-training"
export USE_GRADIENT_CHECKPOINTING=true
export USE_EMA=true
export EMA_DECAY=0.999
export MIXED_PRECISION="bf16"                # Might not be supported
export LR_SCHEDULE="constant"
"""
KOHYA = """
[model_arguments]
pretrained_model_name_or_path = "pixart.safetensors"
[additional_network_arguments]
network_module = "lycoris.kohya"
network_dim = 16
network_args = ["algo=lokr", "factor=8", "conv_dim=4"]
unet_lr = 2e-4
[optimizer_arguments]
learning_rate = 1e-4
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 1
[training_arguments]
output_name = "mine"
max_train_steps = 1500
train_batch_size = 2
min_snr_gamma = 5.0
max_timestep = 1000
mixed_precision = "bf16"
keep_tokens = 2
"""


def write(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def settings_of(path):
    config, lines = import_config(path)
    return config, config.settings, "\n".join(lines)


def test_onetrainers_fields_are_taken_and_the_rest_is_named(tmp_path):
    config, settings, said = settings_of(write(tmp_path, "one.json", ONETRAINER))
    assert (config.name, config.output) == ("lora", "models")
    assert (settings.kind, settings.rank, settings.alpha, settings.batch_size) == ("lora", 8, 1.0, 4)
    assert (settings.schedule, settings.warmup_steps, settings.optimizer) == ("cosine", 200, "adafactor")
    assert (settings.ema_decay, settings.checkpointing, settings.dtype) == (0.99, "on", "bf16")
    assert (settings.timestep_max, settings.weighting, settings.caption_dropout) == (499, "min_snr", 0.05)
    assert settings.weight_decay == 0.02 and "50 epochs" in said and "not taken: masked_training: True" in said
    assert "model: put the path" in said and "resolution 1024" in said and "OneTrainer" in said
    assert "vb_loss_strength 1: set train_variance to true" in said


def test_simpletuners_fields_are_taken_from_json_and_environment(tmp_path):
    config, settings, said = settings_of(write(tmp_path, "config.json", SIMPLETUNER))
    assert (settings.kind, settings.rank, settings.steps, settings.base_dtype) == ("lora", 32, 100, "int8")
    assert settings.wandb and not settings.tensorboard and settings.sample_every == 50 and config.prompts == ("a cat",)
    assert "adamw_bf16 keeps weights in bf16" in said and "--upload" in said
    assert "not taken: aspect_bucket_rounding: 2" in said
    _, settings, said = settings_of(write(tmp_path, "config.env", ENVIRONMENT))
    assert (settings.kind, settings.learning_rate, settings.steps) == ("full", 8e-7, 30000)
    assert (settings.checkpointing, settings.ema_decay, settings.dtype) == ("on", 0.999, "bf16")
    assert "tracker" not in said and "flux" not in said


def test_kohyas_fields_are_taken(tmp_path):
    pytest.importorskip("tomllib")
    config, settings, said = settings_of(write(tmp_path, "kohya.toml", KOHYA))
    assert (config.name, config.model) == ("mine", "pixart.safetensors")
    assert (settings.adapter, settings.lokr_factor, settings.rank, settings.alpha) == ("lokr", 8, 16, 1.0)
    assert (settings.learning_rate, settings.optimizer, settings.weight_decay) == (2e-4, "adamw8bit", 0.1)
    assert (settings.schedule, settings.steps, settings.timestep_max) == ("cosine", 1500, 999)
    assert "not taken: network_args conv_dim: 4" in said and "not taken: keep_tokens: 2" in said


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.json", {**ONETRAINER, "training_method": "EMBEDDING"}, "Means another training: got training_method"),
        ("a.json", {**ONETRAINER, "model_type": "FLUX_DEV_1"}, "got model_type 'FLUX_DEV_1', expected PIXART_ALPHA or"),
        (
            "a.json",
            {**ONETRAINER, "optimizer": {"optimizer": "ADAFACTOR", "relative_step": True}},
            "relative_step True",
        ),
        ("a.json", {**ONETRAINER, "huber_strength": 1.0, "mse_strength": 0.0}, "got huber_strength 1.0, expected 0"),
        ("a.json", {**ONETRAINER, "learning_rate_scheduler": "REX"}, "got learning_rate_scheduler 'REX', expected one"),
        ("a.json", {**SIMPLETUNER, "--lora_type": "lycoris"}, "got lora_type 'lycoris'"),
        ("a.json", {**SIMPLETUNER, "--prediction_type": "v_prediction"}, "got prediction_type 'v_prediction'"),
        ("a.toml", KOHYA + "v_parameterization = true\n", "got v_parameterization True, expected 0"),
        ("a.toml", KOHYA + 'loss_type = "huber"\n', "got huber_schedule 'snr', expected constant"),
        ("a.toml", KOHYA.replace("lokr", "boft"), "got algo 'boft'"),
        ("a.toml", "a = [", "Configuration cannot be read: got 'a.toml'"),
        ("a.json", {"x": 1}, "Configuration of no known trainer"),
        ("a.json", {**ONETRAINER, "learning_rate": "fast"}, "Number cannot be read: got 'fast'"),
        ("a.json", "[" * 5000, "Configuration cannot be read"),
    ],
)
def test_what_means_another_training_is_refused_by_name(name, content, match, tmp_path):
    if name.endswith(".toml"):
        pytest.importorskip("tomllib")
    with pytest.raises(ValueError, match=match):
        import_config(write(tmp_path, name, content))


def test_the_command_writes_a_configuration_that_it_reads_and_replaces_none(tmp_path, capsys):
    source = write(tmp_path, "one.json", ONETRAINER)
    options = ["--import", str(source)]
    assert run_command(train_command.main, train_command.parse(), options) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "one.yaml") in said and "not taken" in said
    assert read_config(tmp_path / "one.yaml").settings.rank == 8
    assert run_command(train_command.main, train_command.parse(), options) == 1
    assert "Exists already" in capsys.readouterr().err
    assert run_command(train_command.main, train_command.parse(), []) == 1
    assert "No configuration" in capsys.readouterr().err
