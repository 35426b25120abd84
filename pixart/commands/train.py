"""`python -m pixart train`: one training outside a graph, in one process or in those of `accelerate launch`."""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..acceleration.compilation import compile_blocks, explain_failure, try_compiler
from ..config import LATENT_DOWNSCALE, PixArtConfig
from ..data.examples import FeatureSet
from ..data.features import open_features
from ..data.sketches import differences, read_sketch, sketch_model
from ..drawing.rates import draw_rates
from ..encoders.autoencoder import load_autoencoder
from ..encoders.t5 import load_text_encoder
from ..files.atomic import write_atomically
from ..files.regular import read_text
from ..lora import read_lora
from ..quoting import plain, shorten
from ..stages.dit import T5_XXL_CHANNELS, read_dit
from ..stages.growth import grow_checkpoint
from ..stages.records import only_stages
from ..tracking.hub import check_repository, upload
from ..training.importing.files import import_config
from ..training.loop import Events, Progress
from ..training.processes import AcceleratedProcesses, SingleProcess
from ..training.run import check_features, choose_folder, train
from ..training.settings import AUTO, WEIGHTS, RunConfig, TrainingSettings, read_config, write_config
from ..training.validation import Decode, ValidationPrompt, read_prompts
from ..training.watching.rates import COUNT, Rates, find_rate
from ..transformer import PixArt
from ..weights.reading import Checkpoint, read_checkpoint
from .console import make_parser

logger = logging.getLogger(__name__)

DESCRIPTION = """Train as configuration files say, one after another. The result, checkpoints, log and pictures of each
come into a new folder, numbered; a training that was ended goes on in its own. Ctrl-C ends the training with its result
and begins no further one; a second Ctrl-C ends it at once."""
EXAMPLES = """examples:
  python -m pixart train training.yaml
  python -m pixart train monday.yaml tuesday.yaml
  python -m pixart train training.yaml --init DiT-XL-2-256x256.pt
  python -m pixart train training.yaml --grow sigma-512
  accelerate launch --multi_gpu --num_processes 8 -m pixart train training.yaml
  ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 -m pixart train training.yaml  # on the CPU

  # training.yaml; paths are relative to it
  model: PixArt-XL-2-512x512.pth
  features: features
  output: runs
  name: my_style
  settings: {kind: lora, steps: 2000, batch_size: 4, learning_rate: 1e-4, rank: 16, dtype: bf16}
  # for validation pictures: sample_every among the settings, and
  prompts: [a small cactus, a lighthouse at night]
  text_encoder: t5-v1_1-xxl
  vae: sd-vae-ft-ema"""
SAME_SIGNAL_S = 2.0  # the launchers pass on a Ctrl-C which the terminal has sent to their processes, too


def parse() -> argparse.ArgumentParser:
    parser = make_parser("train", DESCRIPTION, EXAMPLES)
    parser.add_argument("configs", nargs="*", help="YAML or JSON, as Export PixArt Training Config writes it")
    parser.add_argument(
        "--import",
        dest="imported",
        metavar="FILE",
        help="train nothing: write another trainer's configuration (OneTrainer's or SimpleTuner's JSON, SimpleTuner's "
        "config.env, kohya's TOML) as YAML beside it, and say what was not taken",
    )
    parser.add_argument(
        "--find-rate",
        action="store_true",
        help="train nothing: try rising learning rates for some steps each, and say which one is fit",
    )
    parser.add_argument(
        "--upload",
        metavar="OWNER/NAME",
        help="put each result into this repository of the Hugging Face Hub, private where it is new; nothing is "
        "uploaded without this",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile a block of the model first, which needs a compiler; then faster"
    )
    parser.add_argument("--device", help="of a training in one process; default: the GPU, or else the CPU")
    stages = parser.add_argument_group("what the training begins with, in place of what the configurations say")
    stages.add_argument(
        "--init", metavar="PATH", help="a DiT's .pt or diffusers folder, which a PixArt is made of, in place of a model"
    )
    stages.add_argument(
        "--grow",
        metavar="STAGE",
        help="go on at another size: a variant such as alpha-1024, sigma-512 or "
        "sigma-1024-kvcompress, or a side in pixels",
    )
    stages.add_argument("--start-from", metavar="PATH", help="a LoRA's file or PEFT folder, which a LoRA goes on from")
    add = parser.add_argument_group("validation pictures, in place of what the configurations say").add_argument
    add(
        "--prompts",
        nargs="+",
        metavar="TEXT",
        help="texts to sample every sample_every steps, or one .txt file of lines",
    )
    add("--text-encoder", metavar="PATH", help="T5 file or folder for them")
    add("--tokenizer", metavar="PATH", help="its folder (default: beside the text encoder, or in COMFYUI_PATH)")
    add("--vae", metavar="PATH", help="autoencoder file or folder that decodes the pictures")
    return parser


def main(options) -> None:
    """Train. Raises ValueError and FileNotFoundError for what is wrong with a configuration."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = ("text_encoder", "tokenizer", "vae", "grow", "start_from")
    given = {name: getattr(options, name) for name in names if getattr(options, name)}
    if options.prompts:
        is_file = len(options.prompts) == 1 and options.prompts[0].endswith(".txt")
        given["prompts"] = options.prompts[0] if is_file else tuple(options.prompts)
    if options.imported:
        write_imported(Path(options.imported))
        return
    if not options.configs:
        raise ValueError("No configuration: got none, expected YAML or JSON files. Name one, or give --import a file.")
    configs = [replace(read_config(each, options.init), **given) for each in options.configs]
    if options.find_rate:
        for config in configs:
            find_config_rate(config, options.device)
    else:
        run_configs(configs, options.device, options.upload, options.compile)


def write_imported(source: Path) -> Path:
    """Write another trainer's configuration as one of this pack beside it, and say what is to be done by hand.

    Raises FileExistsError where there is one already.
    """
    config, lines = import_config(source)
    path = source.with_suffix(".yaml")
    if path.exists():
        raise FileExistsError(
            f"Exists already: got {shorten(str(path), 300)}, expected no such file. Move it away, and import again."
        )
    write_config(path, config)
    sys.stdout.write("\n".join([*lines, f"written: {path}"]) + "\n")
    return path


def find_config_rate(config: RunConfig, device: str | None = None) -> Rates:
    """Look for a learning rate for a configuration, say what was found, and draw it beside its runs."""
    processes = _processes(config, device)
    if processes.world_size > 1:
        raise ValueError(
            f"Rates are looked for in one process: got {processes.world_size}, expected 1. Run it without a launcher."
        )
    features = open_features(config.features)
    model, settings = build_model(_beginning(config, features)), config.settings
    check_features(features, model, settings)
    with tqdm(total=COUNT, unit="rate", disable=None) as bar:
        found = find_rate(model, features, settings, processes.device, lambda done, _: bar.update(done - bar.n))
    path = Path(config.output) / f"{config.name}_rates.png"
    write_atomically(path, lambda temporary: draw_rates(found.points, found.suggested).save(temporary, "PNG"))
    advice = "none of them lowers the loss" if found.suggested is None else f"learning_rate: {found.suggested:.1e}"
    sys.stdout.write("\n".join([*found.lines(), f"drawn in {path}", advice]) + "\n")
    return found


def run_configs(
    configs: Sequence[RunConfig], device: str | None = None, repository: str | None = None, compiles: bool = False
) -> None:
    """Train as each configuration says, until one is interrupted.

    In one process, one that fails does not keep the others from their turn; of several processes the others might have
    gone on, and would wait for this one. repository: what each result is uploaded to, None for nothing of it.
    Raises ValueError at the end for those that failed.
    """
    if repository:
        check_repository(repository)
    failed = []
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    for config in configs:
        try:
            result = run_config(config, device, compiles)
            if repository and int(os.environ.get("RANK", "0")) == 0:
                logger.info("uploaded: %s", upload(result.file, repository))
        except (ValueError, OSError, RuntimeError) as error:
            if len(configs) == 1 or not alone:
                raise
            logger.error("error: %s: %s", config.name, error)
            failed.append(config.name)
            continue
        if not result.is_done:
            break
    if failed:
        raise ValueError(
            f"Trainings failed: got {len(failed)} of {len(configs)} ({shorten(', '.join(failed))}), expected none. The "
            f"lines above say why."
        )


def run_config(config: RunConfig, device: str | None = None, compiles: bool = False):
    """Train as a configuration says; returns the TrainingResult. compiles: see compile_for_training."""
    processes = _processes(config, device)
    features = open_features(config.features)
    checkpoint = _beginning(config, features)
    model, stages = build_model(checkpoint), only_stages(checkpoint.metadata)
    if config.base:
        _check_exported(read_sketch(Path(config.base)), model)
    _check_data(config, features)
    if compiles:
        compile_for_training(model, config.settings, processes)
    prompts = _prompts(config, model.config, processes)
    if processes.world_size > 1 and processes.rank == 0:
        kind = "the weights are shared out (FSDP)" if processes.is_sharded else "each has all weights (DDP)"
        logger.info("%d processes: %s", processes.world_size, kind)
    with tqdm(total=config.settings.steps, unit="step", disable=processes.rank > 0 or None) as bar, _Bar(bar) as events:
        result = train(
            model,
            features,
            config.settings,
            _folder(config, processes),
            resume=config.resume,
            processes=processes,
            events=events,
            prompts=prompts,
            decode=_decoder(config, processes.device) if prompts else None,
            texts=stages,
            held_out=open_features(config.validation_features) if config.validation_features else None,
            start=read_lora(config.start_from, model.config) if config.start_from else None,
        )
    if processes.rank == 0:
        for note in result.notes:
            logger.warning("%s", note)
        logger.info("%d steps are done: %s", result.step, result.file)
    return result


def compile_for_training(model: PixArt, settings: TrainingSettings, processes: SingleProcess, **more) -> None:
    """Lets a model, and those that a training makes of it, run its blocks compiled; without a compiler it says so.

    more: see CompiledBlocks. Raises ValueError for settings under which a block is more than its numbers.
    """
    wrong = {
        "checkpointing": settings.checkpointing != "off" and settings.checkpointing,
        "base_dtype": settings.base_dtype != "same" and settings.base_dtype,
        "dropout": settings.dropout,
        "dora": settings.dora,
        "FSDP": processes.is_sharded,
    }
    wrong = [f"{name} {value}" for name, value in wrong.items() if value]
    if wrong:
        raise ValueError(
            f"Training cannot be compiled: got {plain(', '.join(wrong))} with --compile, expected these off. Change "
            f"the settings, or leave --compile out."
        )
    if "backend" in more or not try_compiler(processes.device.type):
        compile_blocks(model, **{"on_failure": explain_failure, **more})


def _prompts(config: RunConfig, model: PixArtConfig, processes: SingleProcess) -> list[ValidationPrompt]:
    """What is to be sampled. Raises ValueError for texts without a text encoder."""
    if not config.prompts:
        return read_prompts(Path(config.validation)) if config.validation else []
    if config.text_encoder is None:
        raise ValueError(
            "No text encoder for the validation prompts: got none, expected a T5 file or folder as 'text_encoder' in "
            "the configuration, or --text-encoder. Name it, or remove the prompts."
        )
    if not config.settings.sample_every and processes.rank == 0:
        logger.warning("no validation pictures: set sample_every")
    texts = config.prompts
    if isinstance(texts, str):
        texts = [line.strip() for line in read_text(texts).splitlines() if line.strip()]
    encode = load_text_encoder(config.text_encoder, config.tokenizer, device=processes.device)
    side = model.base_px // LATENT_DOWNSCALE
    states = encode(texts, model.caption_length)
    return [ValidationPrompt(each.cpu(), (side, side), text=text) for each, text in zip(states, texts, strict=True)]


class _Bar(Events):
    """Progress on a terminal. The first Ctrl-C ends the training with its result written, a second one at once.

    A context: the signals are this training's within it, and whose they were after it.
    """

    def __init__(self, bar: tqdm):
        self.bar, self.stopped_at, self._before = bar, None, {}

    def __enter__(self) -> "_Bar":
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._stop) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _stop(self, number, _frame) -> None:
        if self.stopped_at is None:
            self.stopped_at = time.monotonic()
        elif time.monotonic() - self.stopped_at > SAME_SIGNAL_S:
            raise KeyboardInterrupt

    def should_stop(self) -> bool:
        return self.stopped_at is not None

    def stepped(self, progress: Progress) -> None:
        self.bar.update(progress.step - self.bar.n)
        self.bar.set_postfix(loss=f"{progress.smoothed:.4f}", rate=f"{progress.learning_rate:.2g}", refresh=False)


def _processes(config: RunConfig, device: str | None) -> SingleProcess:
    if device is None and (int(os.environ.get("WORLD_SIZE", "1")) > 1 or "ACCELERATE_MIXED_PRECISION" in os.environ):
        return AcceleratedProcesses(config.settings)
    return SingleProcess(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _folder(config: RunConfig, processes: SingleProcess) -> Path:
    """The run's folder; every process chooses before the first one makes it."""
    folder = choose_folder(Path(config.output), config.name, config.resume, config.settings.steps)
    processes.wait()
    return folder


def _check_exported(sketch: Mapping, model: PixArt) -> None:
    wrong = differences(sketch, sketch_model(model))
    if wrong:
        raise ValueError(
            f"Another model than was exported: got {plain('; '.join(wrong), 400)}, expected the model that was "
            f"connected to the node. Put that file in its place, correct model, variant and weights, or export again."
        )


def _check_data(config: RunConfig, features: FeatureSet) -> None:
    if config.data and features.identity != config.data:
        raise ValueError(
            f"Other pictures or captions than were exported: got another content of "
            f"{shorten(str(config.features), 300)}, expected it as it was. Export the configuration again, or remove "
            f"'data' from it."
        )


def load_model(path: str, variant: str = AUTO, weights: str = WEIGHTS[0]) -> PixArt:
    """The PixArt of a checkpoint file or folder, in the dtype of its weights.

    variant: of config.CONFIGS, or AUTO. weights: of WEIGHTS.
    """
    return build_model(read_checkpoint(path, weights=weights, **hints_of(variant)))


def hints_of(variant: str) -> dict:
    """What a chosen variant, or AUTO, says to the reader of a file."""
    return {} if variant == AUTO else {"variant": variant}


def _beginning(config: RunConfig, features: FeatureSet) -> Checkpoint:
    """The model that a training begins with: a file's, or one made of a DiT, and grown where that is asked for."""
    if config.init:
        channels = features[0].caption.shape[-1] if len(features) else T5_XXL_CHANNELS
        seed = config.settings.seed
        checkpoint = read_dit(config.init, weights=config.weights, seed=seed, caption_channels=channels)
    else:
        checkpoint = read_checkpoint(config.model, weights=config.weights, **hints_of(config.variant))
    return grow_checkpoint(checkpoint, config.grow, config.settings.seed) if config.grow else checkpoint


def build_model(checkpoint: Checkpoint) -> PixArt:
    """The PixArt of a checkpoint, in the dtype of its weights."""
    model = PixArt(checkpoint.config, device="meta")
    model.load_state_dict(checkpoint.state_dict, assign=True)
    return model


def _decoder(config: RunConfig, device) -> Decode:
    if config.vae is None:
        raise ValueError(
            "No autoencoder for the validation pictures: got none, expected its file as 'vae' in the configuration. "
            "Add it, or remove 'validation'."
        )
    autoencoder = load_autoencoder(config.vae, device=device)

    def decode(latent):
        return (autoencoder.decode(latent).float() / 2 + 0.5).movedim(1, -1)  # (B, H, W, 3) in [0, 1]

    return decode
