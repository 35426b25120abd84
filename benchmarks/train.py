"""A LoRA step at XL/2 width: this pack's trainer, diffusers with PEFT, and ComfyUI's own trainer.

The same random weights, adapters and batch. Captions are as each program feeds them: the pack's cache holds them at
their true length, the scripts for diffusers pad them to the model's. Steps take turns. Memory is what a step needs at
its peak beyond the weights: of the GPU, or of this process (Linux).
"""

import argparse
import logging
import statistics
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from ..pixart.data.examples import Batch
from ..pixart.diffusion import Diffusion
from ..pixart.training.build import make_objective
from ..pixart.training.draws import draw_batch
from ..pixart.training.settings import TrainingSettings
from ..pixart.transformer import PixArt
from ..pixart.weights.saving import DTYPES
from .cases import name_device, parse_run
from .host import import_host
from .peaks import measure_peak
from .peers import OURS, make_config, make_transformer, make_weights
from .report import RESULTS, describe_ratio, keep_runs, markdown_table
from .timing import compare, take_turns

VARIANT = "alpha-256"
PEFT = "diffusers + PEFT"
RANK = 16
LEARNING_RATE = 1e-4
PEFT_TARGETS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "blocks": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
}

logger = logging.getLogger(__name__)


def make_batch(config, size, caption_tokens, seed=0) -> Batch:
    """Random pictures of the trained size with captions of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    side = config.base_size * config.patch_size
    return Batch(
        latent=torch.randn(size, config.in_channels, side, side, generator=generator),
        caption=torch.randn(size, caption_tokens, config.caption_channels, generator=generator),
        caption_mask=torch.ones(size, caption_tokens, dtype=torch.bool),
        resolution=torch.full((size, 2), float(config.base_px)),
        aspect_ratio=torch.ones(size, 1),
        is_prior=torch.zeros(size, dtype=torch.bool),
    )


class Trainee:
    """One optimiser step after another. parameters: those that are trained."""

    def __init__(self, parameters, fused=True):
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE, fused=fused)

    def loss(self):
        raise NotImplementedError

    def step(self):
        """The loss of this step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.item()


class Ours(Trainee):
    """The pack's LoRA objective."""

    def __init__(self, config, weights, batch, settings, device, fused=True):
        model = PixArt(config, device="meta")
        model.load_state_dict(dict(weights), assign=True)
        self.objective = make_objective(model, settings, device).train()
        self.batch = batch.to(device)
        self.draws = draw_batch(settings, 0, range(len(batch)), batch.latent.shape[1:]).to(device)
        super().__init__((each for each in self.objective.parameters() if each.requires_grad), fused)

    def loss(self):
        return self.objective(self.batch, self.draws).total


class Peft(Trainee):
    """What PixArt's LoRA script does: diffusers' transformer with PEFT's adapters, fp32 adapters under autocast."""

    def __init__(self, config, weights, batch, settings, device):
        import peft

        network = make_transformer(config, weights)
        network.requires_grad_(False).to(device, DTYPES[settings.dtype])
        adapters = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PEFT_TARGETS[settings.targets])
        self.network = peft.get_peft_model(network, adapters).train()
        self.device, self.dtype = device, DTYPES[settings.dtype]
        self.draws = draw_batch(settings, 0, range(len(batch)), batch.latent.shape[1:]).to(device)
        padding = config.caption_length - batch.caption.shape[1]
        self.start = batch.latent.to(device) * config.vae_scale
        self.caption = F.pad(batch.caption, (0, 0, 0, padding)).to(device, self.dtype)
        self.mask = F.pad(batch.caption_mask, (0, padding)).to(device, self.dtype)
        self.diffusion = Diffusion().to(device)
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.data = parameter.data.float()
        super().__init__(parameters)

    def loss(self):
        noisy = self.diffusion.q_sample(self.start, self.draws.timestep, self.draws.noise)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype != torch.float32):
            predicted = self.network(
                noisy.to(self.dtype),
                encoder_hidden_states=self.caption,
                encoder_attention_mask=self.mask,
                timestep=self.draws.timestep,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0]
        return F.mse_loss(predicted[:, : noisy.shape[1]].float(), self.draws.noise)


def try_host(depth, caption_tokens) -> str:
    """What ComfyUI's own TrainLoraNode says to its own PixArt (alpha 1024, which it knows) of so many blocks."""
    import_host()
    import comfy.sd
    from comfy_extras.nodes_train import TrainLoraNode

    config = make_config("alpha-1024", depth)
    weights, batch = make_weights(config, torch.float32), make_batch(config, 1, caption_tokens)
    values = {"steps": 1, "training_dtype": "none", "lora_dtype": "fp32", "gradient_checkpointing": False}
    fields = TrainLoraNode.GET_SCHEMA().inputs
    inputs = {each.id: [values.get(each.id, getattr(each, "default", None))] for each in fields}
    inputs |= {"latents": [{"samples": batch.latent}], "positive": [[[batch.caption[:1], {}]]]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file(weights, path)
        inputs["model"] = [comfy.sd.load_diffusion_model(str(path))]
        try:
            with torch.inference_mode():
                TrainLoraNode.execute(**inputs)
        except Exception as error:  # noqa: BLE001  whatever it is, is the result
            lines = str(error).strip().splitlines()
            return f"fails: {type(error).__name__}{': ' + lines[0] if lines else ''}"
    return "runs"


def main(arguments):
    """Run the benchmark and write results/train.json and .md."""
    parser = argparse.ArgumentParser(prog="benchmarks train", description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 28], help="blocks of XL/2")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--targets", choices=list(PEFT_TARGETS), nargs="+", default=["attention"])
    parser.add_argument("--caption", type=int, default=20, help="true tokens of a caption")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parse_run(parser, arguments, rounds=5)
    device = options.device
    import_host(device)
    dtype = options.dtype or ("bf16" if device == "cuda" else "fp32")
    for depth in options.depths:
        for batch in options.batches:
            for targets in options.targets:
                publish([measure(depth, batch, targets, dtype, device, options)], options.out)
    host = {"case": {"trainer": "ComfyUI"}, "says": try_host(min(options.depths), options.caption)}
    logger.info("%s", publish([host], options.out))


def measure(depth, batch_size, targets, dtype, device, options) -> dict:
    """Seconds and peak bytes of both trainers, and their ratios."""
    config = make_config(VARIANT, depth)
    weights = make_weights(config, DTYPES[dtype])
    batch = make_batch(config, batch_size, options.caption)
    settings = TrainingSettings(
        rank=RANK, targets=targets, batch_size=batch_size, dtype=dtype, caption_dropout=0.0, learning_rate=LEARNING_RATE
    )
    given = (config, weights, batch, settings, device)
    trainees = {OURS: Ours(*given), PEFT: Peft(*given)}
    rivals = {name: trainee.step for name, trainee in trainees.items()}
    seconds = take_turns(rivals, options.rounds, options.clock, device)
    peaks = {name: measure_peak(trainee.step, device) for name, trainee in trainees.items()}
    return {
        "case": {
            "blocks": depth,
            "batch": batch_size,
            "targets": targets,
            "caption": options.caption,
            "dtype": dtype,
            "device": name_device(device),
            "threads": torch.get_num_threads(),
            "clock": options.clock,
        },
        "seconds": seconds,
        "images_per_second": {name: batch_size / statistics.median(values) for name, values in seconds.items()},
        "speed": compare(seconds, PEFT, OURS),
        "peak_bytes": peaks,
    }


def publish(runs, folder):
    """Add runs to train.json and write train.md again. Returns its text."""
    rows, told = [], []
    for run in keep_runs(folder / "train.json", runs):
        case = run["case"]
        if "says" in run:
            told.append(f"\n{case['trainer']}'s own Train LoRA on its own PixArt {run['says']}.\n")
            continue
        rates, peaks = run["images_per_second"], run["peak_bytes"]
        memory = f"{peaks[OURS] / peaks[PEFT]:.2f}" if peaks[PEFT] else "not measured"
        settings = f"{case['dtype']}, {case['device']}, {case['threads']} threads, {case['clock']} time"
        rows.append(
            [case["blocks"], case["batch"], case["targets"], settings, len(run["seconds"][OURS])]
            + [f"{rates[OURS]:.3g}", f"{rates[PEFT]:.3g}", describe_ratio(run["speed"])]
            + [f"{peaks[OURS] / 2**20:.0f} MiB", f"{peaks[PEFT] / 2**20:.0f} MiB", memory]
        )
    head = ["blocks", "batch", "layers", "settings", "rounds"]
    head += [f"images/s, {OURS}", f"images/s, {PEFT}", "ratio", f"memory, {OURS}", f"memory, {PEFT}", "ratio"]
    text = f"A LoRA of rank {RANK} on XL/2's width at 256 px:\n\n{markdown_table(head, rows)}{''.join(told)}"
    (folder / "train.md").write_text(text, encoding="utf-8")
    return text
