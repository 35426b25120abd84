"""Training nodes: LoRA, whole models, LCM distillation, ControlNet, and the same outside ComfyUI."""

from comfy_api.latest import io, ui

from ..pixart.training.settings import (
    ADAPTERS,
    DISTILLED,
    DTYPES,
    FAKES,
    LOSSES,
    OPTIMIZERS,
    PRIOR_TARGETS,
    SCHEDULES,
    TARGETS,
    WEIGHTINGS,
)
from .host.folders import show_path
from .host.lora import list_loras
from .host.schema import node_input, schema
from .host.text.captions import show_text
from .host.training.runs import AUTO_DTYPE, export_config, fingerprint_training, make_settings, run_training
from .host.types import FeaturesType

CATEGORY = "PixArt/training"
MAX_STEPS = 10_000_000
MODEL_TIP = "The PixArt to train on. It stays as it is; LoRAs on it count as part of its weights."
STOP_TIP = (
    "Cancel stops the training alone: everything is saved and the graph goes on with what is there; a second cancel "
    "ends the prompt. Queued again, an unfinished training of the same name goes on."
)
FINE_TUNES, DISTILLATIONS = {"fine-tune": "full", "DreamBooth": "dreambooth"}, {"LoRA": "lcm_lora", "model": "lcm"}
MATCHINGS = {"LoRA": "dmd_lora", "model": "dmd"}
EXPORTED = {
    **{"LoRA": "lora", **FINE_TUNES, "LCM LoRA": "lcm_lora", "LCM": "lcm"},
    **{"DMD LoRA": "dmd_lora", "DMD": "dmd", "ControlNet": "controlnet"},
}

NONE = "none"
USUAL, WITH_VARIANCE = "usual", ("full", "dreambooth", "controlnet")


def _int(name, default, low, high, tooltip, **fields):
    return node_input(io.Int, name, default=default, min=low, max=high, tooltip=tooltip, **fields)


def _float(name, default, low, high, step, tooltip, **fields):
    return node_input(io.Float, name, default=default, min=low, max=high, step=step, tooltip=tooltip, **fields)


def _combo(name, options, default, tooltip, **fields):
    return node_input(io.Combo, name, options=list(options), default=default, tooltip=tooltip, **fields)


def _boolean(name, default, tooltip, **fields):
    return node_input(io.Boolean, name, default=default, tooltip=tooltip, **fields)


RARE = {"optional": True, "advanced": True}


def _first_inputs(name: str, steps: int, rate: float) -> list:
    return [
        node_input(io.Model, "model", tooltip=MODEL_TIP),
        node_input(FeaturesType, "features", tooltip="The output of PixArt Encode Dataset."),
        node_input(
            io.String,
            "name",
            default=name,
            tooltip="Of the training, and of the file that it makes. Log, checkpoints and pictures are kept in "
            "output/pixart_training.",
        ),
        _int("steps", steps, 1, MAX_STEPS, f"Optimiser steps. {STOP_TIP}"),
        _int("batch_size", 1, 1, 4096, "Pictures at once: more is steadier and takes more memory."),
        _float(
            "learning_rate",
            rate,
            0.0,
            10.0,
            1e-7,
            "How far each step goes. Too high makes the loss explode; the node then says so.",
            round=False,
        ),
        _int("seed", 0, 0, 0xFFFFFFFFFFFFFFFF, "Of noise, timesteps and order: the same seed trains the same weights."),
    ]


def _lora_inputs(rank: int) -> list:
    return [
        _int("rank", rank, 1, 1024, "Size of the LoRA. 4 to 32 is usual."),
        _float("alpha", 0.0, 0.0, 65536.0, 1.0, "The LoRA is multiplied by alpha / rank. 0: as the rank.", **RARE),
        _combo(
            "targets",
            TARGETS,
            "attention",
            "Which layers get one. attention; blocks: the feed-forward layers too; all-linear: the embedders too; "
            "custom: target_pattern in more_settings.",
        ),
        _float("dropout", 0.0, 0.0, 0.95, 0.01, "Share of the LoRA's inputs left out at random.", **RARE),
        _boolean("dora", False, "DoRA: lengths and directions of the weights apart. Slower, often better.", **RARE),
        _boolean("rslora", False, "rsLoRA: alpha / sqrt(rank), for large ranks.", **RARE),
        _boolean("base_fp8", False, "Keep the frozen model in 8 bits: 0.6 GB less for PixArt-XL.", **RARE),
    ]


def _last_inputs(sample_steps: int = 20) -> list:
    return [
        _int("accumulation", 1, 1, 4096, "Batches per step, for a large batch in little memory.", **RARE),
        _combo("optimizer", OPTIMIZERS, "adamw", "Others than adamw need their package; prodigy: rate 1.", **RARE),
        _combo("schedule", SCHEDULES, "constant", "Course of the learning rate after the warm-up.", **RARE),
        _int("warmup_steps", 0, 0, MAX_STEPS, "Steps in which the learning rate rises from 0.", **RARE),
        _combo(
            "weighting",
            WEIGHTINGS,
            "none",
            "Weight of each noise level. min_snr: little noise counts less. velocity: much noise counts more.",
            **RARE,
        ),
        _float(
            "caption_dropout",
            0.1,
            0.0,
            1.0,
            0.01,
            "Share trained without its caption, for guidance.",
            **RARE,
        ),
        _float(
            "ema_decay", 0.0, 0.0, 0.99999, 1e-5, "Save the moving average of the weights: 0.99 and up. 0: off.", **RARE
        ),
        _combo("dtype", (AUTO_DTYPE, *DTYPES), AUTO_DTYPE, "Precision of the maths. auto: bf16 on a GPU.", **RARE),
        _boolean(
            "checkpointing",
            False,
            "Half the memory or less, at a third more time. Between them: 'checkpointing: selective' in more_settings.",
            **RARE,
        ),
        _int(
            "checkpoint_every", 250, 0, MAX_STEPS, "Steps between checkpoints, from which a training goes on.", **RARE
        ),
        _boolean("resume", True, "Go on with the unfinished training of this name. Off: begin a new one.", **RARE),
        _int("sample_every", 0, 0, MAX_STEPS, "Steps between validation pictures. Needs the vae. 0: none.", **RARE),
        _int("sample_steps", sample_steps, 1, 1000, "Sampler steps of the validation pictures.", **RARE),
        node_input(
            io.String,
            "more_settings",
            default="",
            multiline=True,
            tooltip="Further settings in lines of 'name: value', such as 'loss: huber' or 'timestep_min: 200'. The "
            "help page lists them.",
            **RARE,
        ),
        node_input(
            io.Conditioning,
            "validation",
            optional=True,
            tooltip="Prompts of the validation pictures; several by Conditioning Combine or as a batch. Without them "
            "the dataset's first captions.",
        ),
        node_input(io.Vae, "vae", optional=True, tooltip="Decodes the validation pictures."),
    ]


def _watch_inputs() -> list:
    return [
        _float(
            "validation_share",
            0.0,
            0.0,
            0.5,
            0.01,
            "Share of the pictures that the training does not see, and on which its loss is measured. The best state "
            "is kept. In more_settings: validation_every, patience.",
            **RARE,
        ),
        node_input(
            FeaturesType,
            "validation_features",
            optional=True,
            tooltip="Encoded pictures for the validation loss, in place of a share of the others.",
        ),
    ]


def _adapter_inputs() -> list:
    return [
        _combo("adapter", ADAPTERS, "lora", "What is trained: a LoRA, or a LoHa, LoKr or OFT in its place.", **RARE),
        _combo(
            "start_from",
            (NONE, *list_loras()),
            NONE,
            "A LoRA whose weights the training begins with. Rank, alpha and layers are the file's.",
            **RARE,
        ),
    ]


def _prior_inputs() -> list:
    return [
        _float("prior_weight", 1.0, 0.0, 1000.0, 0.05, "Weight of prior pictures.", **RARE),
        _combo(
            "prior_target",
            PRIOR_TARGETS,
            "picture",
            "What prior pictures teach. picture: themselves, as DreamBooth does. model: what the model without the "
            "LoRA makes of them, which holds on to what it knows.",
            **RARE,
        ),
    ]


def _matching_inputs(**fields) -> list:
    return [
        _float("dmd_guidance", 4.5, 0.0, 100.0, 0.1, "Guidance of the teacher: its cfg.", **fields),
        _float(
            "dmd_regression",
            0.25,
            0.0,
            1000.0,
            0.05,
            "Weight of the teacher's pictures, where the features are pairs of 'python -m pixart pairs'.",
            **RARE,
        ),
        _combo(
            "dmd_fake",
            FAKES,
            "lora",
            "What is trained of the network that follows the new model: a LoRA, or a copy of all weights.",
            **RARE,
        ),
    ]


def _outputs(trained) -> list:
    return [
        trained,
        io.String.Output(display_name="file", tooltip="Where the result was saved."),
        io.Image.Output(display_name="loss_curve", tooltip="Loss by step: each one, and smoothed."),
        io.Image.Output(display_name="samples", tooltip="Validation pictures, a row for each time; grey without any."),
    ]


def _schema(cls_id, display_name, description, aliases, inputs, outputs):
    return schema(
        node_id=cls_id,
        display_name=display_name,
        category=CATEGORY,
        description=f"{description} {STOP_TIP}",
        search_aliases=aliases,
        inputs=inputs,
        outputs=outputs,
        hidden=[io.Hidden.unique_id],
        is_output_node=True,
    )


LINKED = ("resume", "validation", "vae", "validation_features")  # inputs that are no settings


def _train(hidden, kind, model, features, name, more_settings="", start_from=NONE, **values):
    values["base_dtype"] = "fp8" if values.pop("base_fp8", False) else "same"
    linked = {name: values.pop(name) for name in LINKED if name in values}
    settings = make_settings(kind, more_settings, **values)
    start = None if start_from == NONE else start_from
    done = run_training(model, features, settings, name, start_from=start, hidden=hidden, **linked)
    show_text(hidden, done.info)
    return io.NodeOutput(done.trained, done.file, done.curve, done.samples, ui=ui.PreviewText(done.info))


class _Training(io.ComfyNode):
    """What trains: queued again, an unfinished training goes on, and a finished one is not made again."""

    @classmethod
    def fingerprint_inputs(cls, name=None, **_):
        return fingerprint_training(name, cls.hidden)


class TrainLoRA(_Training):
    """Train a LoRA, DoRA or rsLoRA."""

    @classmethod
    def define_schema(cls):
        return _schema(
            "PixArtTrainLoRA",
            "Train PixArt LoRA",
            "Teach a PixArt model a style, a thing or a person from encoded pictures, as a small file.",
            ["train lora", "fine-tune", "dora", "rslora", "dreambooth lora"],
            [
                *(*_first_inputs("my_lora", 1000, 1e-4), *_lora_inputs(16), *_last_inputs(), *_prior_inputs()),
                *(*_adapter_inputs(), *_watch_inputs()),
            ],
            _outputs(io.Model.Output(display_name="model", tooltip="The model with the LoRA on it.")),
        )

    @classmethod
    def execute(cls, model, features, name, **values):
        return _train(cls.hidden, "lora", model, features, name, **values)


class Train(_Training):
    """Train all weights."""

    @classmethod
    def define_schema(cls):
        return _schema(
            "PixArtTrain",
            "Train PixArt",
            "Train all weights of a PixArt model: fine-tuning on many pictures, or DreamBooth on a few, which with "
            "prior pictures in the dataset keeps the rest of their class.",
            ["fine-tune", "dreambooth", "full training", "prior preservation"],
            [
                *_first_inputs("my_model", 1000, 1e-5),
                _combo("method", FINE_TUNES, "fine-tune", "DreamBooth: prior pictures count by prior_weight."),
                _float("prior_weight", 1.0, 0.0, 1000.0, 0.05, "Weight of prior pictures.", optional=True),
                _boolean("train_variance", True, "Also train the variance, as the original does.", **RARE),
                *_last_inputs(),
                *_watch_inputs(),
            ],
            _outputs(io.Model.Output(display_name="model", tooltip="The trained model.")),
        )

    @classmethod
    def execute(cls, model, features, name, method, train_variance=True, **values):
        train_variance = train_variance and _learns_sigma(model)
        return _train(cls.hidden, FINE_TUNES[method], model, features, name, train_variance=train_variance, **values)


class DistillLCM(_Training):
    """Distil a model into one for few steps."""

    @classmethod
    def define_schema(cls):
        return _schema(
            "PixArtDistillLCM",
            "Distill PixArt LCM",
            "Make a model that needs 4 to 8 steps and no guidance (latent consistency distillation), as a LoRA or a "
            "whole model. Sample it with the pixart_lcm sampler and scheduler at cfg 1.",
            ["lcm", "lcm lora", "distillation", "few steps", "consistency"],
            [
                *_first_inputs("my_lcm", 1000, 1e-4),
                _combo("method", DISTILLATIONS, "LoRA", "A LoRA, or all weights, which takes three models' memory."),
                _float("lcm_guidance", 4.5, 0.0, 100.0, 0.1, "Guidance w that is distilled in; cfg minus 1."),
                *_lora_inputs(32),
                _combo("loss", ("huber", "mse"), "huber", "The original's is huber.", **RARE),
                *_last_inputs(sample_steps=4),
                *_watch_inputs(),
            ],
            _outputs(io.Model.Output(display_name="model", tooltip="The distilled model.")),
        )

    @classmethod
    def execute(cls, model, features, name, method, **values):
        return _train(cls.hidden, DISTILLATIONS[method], model, features, name, **values)


class DistillDMD(_Training):
    """Distil a model into one for a single step."""

    @classmethod
    def define_schema(cls):
        return _schema(
            "PixArtDistillDMD",
            "Distill PixArt DMD",
            "Make a model that needs one step and no guidance (distribution matching distillation), as a LoRA or a "
            "whole model. Sample it with the pixart_dmd sampler and scheduler at 1 step and cfg 1.",
            ["dmd", "one step", "distribution matching", "distillation", "pixart dmd"],
            [
                *_first_inputs("my_dmd", 1000, 1e-4),
                _combo("method", MATCHINGS, "LoRA", "A LoRA, or all weights, which takes two models' memory."),
                *_matching_inputs(),
                *_lora_inputs(32),
                _combo("loss", ("mse", "huber"), "mse", "Distance to the teacher's pictures of known noises.", **RARE),
                *_last_inputs(sample_steps=1),
            ],
            _outputs(io.Model.Output(display_name="model", tooltip="The distilled model.")),
        )

    @classmethod
    def execute(cls, model, features, name, method, **values):
        return _train(cls.hidden, MATCHINGS[method], model, features, name, **values)


class TrainControlNet(_Training):
    """Train a ControlNet from the base's own blocks."""

    @classmethod
    def define_schema(cls):
        return _schema(
            "PixArtTrainControlNet",
            "Train PixArt ControlNet",
            "Train a ControlNet on pictures that were encoded with control pictures; it begins as a copy of the "
            "model's first blocks.",
            ["controlnet training", "canny", "hed", "control"],
            [
                *_first_inputs("my_controlnet", 5000, 2e-5),
                _int("control_blocks", 13, 1, 1000, "Blocks to copy: 13 of 28 in the original.", **RARE),
                _boolean("train_variance", True, "Also train the variance, as the original does.", **RARE),
                *_last_inputs(),
                *_watch_inputs(),
            ],
            _outputs(io.ControlNet.Output(display_name="control_net", tooltip="The trained ControlNet.")),
        )

    @classmethod
    def execute(cls, model, features, name, train_variance=True, **values):
        train_variance = train_variance and _learns_sigma(model)
        return _train(cls.hidden, "controlnet", model, features, name, train_variance=train_variance, **values)


class ExportTrainingConfig(io.ComfyNode):
    """Write a training down, to run it outside ComfyUI."""

    @classmethod
    def define_schema(cls):
        return schema(
            node_id="PixArtExportTrainingConfig",
            display_name="Export PixArt Training Config",
            category=CATEGORY,
            description="Write a training as a YAML file for 'python -m pixart train file.yaml', or on many "
            "GPUs for 'accelerate launch -m pixart train file.yaml'. Run it in this pack's folder.",
            search_aliases=["accelerate", "multi gpu training", "yaml", "command line"],
            inputs=[
                _combo("kind", EXPORTED, "LoRA", "What is to be trained."),
                *_first_inputs("my_training", 1000, 1e-4),
                *_lora_inputs(16),
                *_last_inputs(),
                *_prior_inputs(),
                _boolean("train_variance", True, "Of whole models and ControlNets, as the original does.", **RARE),
                _float("lcm_guidance", 4.5, 0.0, 100.0, 0.1, "Of LCM: the guidance that is distilled in.", **RARE),
                _int("control_blocks", 13, 1, 1000, "Of a ControlNet: blocks to copy.", **RARE),
                _combo("loss", (USUAL, *LOSSES), USUAL, "usual: huber for LCM, mse for all others.", **RARE),
                *_matching_inputs(**RARE),
                *_adapter_inputs(),
                *_watch_inputs(),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The configuration.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        kind,
        model,
        features,
        name,
        base_fp8=False,
        more_settings="",
        train_variance=True,
        loss=USUAL,
        start_from=NONE,
        **values,
    ):
        kind = EXPORTED[kind]
        values["loss"] = ("huber" if kind in DISTILLED else "mse") if loss == USUAL else loss
        values["train_variance"] = train_variance and kind in WITH_VARIANCE and _learns_sigma(model)
        linked = {name: values.pop(name) for name in LINKED if name in values}
        settings = make_settings(kind, more_settings, base_dtype="fp8" if base_fp8 else "same", **values)
        start = None if start_from == NONE else start_from
        path = show_path(export_config(model, features, settings, name, start_from=start, **linked))
        text = f"saved: {path}\nrun: accelerate launch -m pixart train '<whole path of ComfyUI>/{path}'"
        show_text(cls.hidden, text)
        return io.NodeOutput(path, ui=ui.PreviewText(text))


def _learns_sigma(model) -> bool:
    """Whether there is a variance to train; what is no PixArt is refused later, by name."""
    config = getattr(model.model, "pixart_config", None)
    return config is None or config.learn_sigma


NODES: list[type[io.ComfyNode]] = [TrainLoRA, Train, DistillLCM, DistillDMD, TrainControlNet, ExportTrainingConfig]
