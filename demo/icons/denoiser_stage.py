"""Training the demo's PixArt and its T5 encoder together, from nothing, on the latents of a pool."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ...pixart.config import PixArtConfig
from ...pixart.diffusion import Diffusion
from ...pixart.layers import attend
from ...pixart.training.optimizers import MovingAverage
from ...pixart.transformer import PixArt, initialize_weights
from ..autoencoder import VAE_SCALE, Autoencoder
from ..denoiser_stage import draw_timesteps, export_models, start_as_identity
from ..generate import DemoModel, generate
from ..loop import Resumable, clip_gradients
from ..text import END, PAD, make_text_batch
from .autoencoder_stage import held_out_scenes
from .captions import caption, describe
from .pool import Pool, encode
from .scorer import add_scores, read, score
from .text import T5_FIELDS, TrainedText, add_fillers, vocabulary

CONFIG = PixArtConfig(
    depth=8,
    hidden_size=192,
    num_heads=4,
    mlp_ratio=2.0,
    caption_channels=T5_FIELDS["d_model"],
    base_size=8,
    pe_scale=1.0,
    vae_scale=VAE_SCALE,
)
SMALL_UNTIL = 0.3  # share of the run on small pictures
NULL_SHARE = 0.1
MAX_WEIGHT = 200.0
BOUND_WEIGHT = 0.003
MAX_BOUND = 20.0  # bits; the first timesteps' likelihood has outliers
LEARNING_RATES = {"edges": 4e-4, "text": 1e-3, "body": 1.2e-3}
WARM_UP_STEPS = 200
PROBED = (400, 600, 750, 900)  # timesteps at which it is measured whether the caption is read


def attend_exactly(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """`layers.attend` in float32 within an autocast: on processors its backward in bfloat16 takes ten times as long."""
    with torch.autocast(q.device.type, enabled=False):
        return attend(q.float(), k.float(), v.float(), num_heads, None if mask is None else mask.float())


@dataclass
class Batch:
    """What a step takes: latents and noise (B, 4, h, w), ids and masks (B, L), timesteps (B,), height and width."""

    start: Tensor
    ids: Tensor
    attended: Tensor
    kept: Tensor
    timestep: Tensor
    noise: Tensor
    size_px: tuple[int, int]


class Batches(Dataset):
    """Batches by the step's number."""

    def __init__(self, pools: Sequence[Pool], tokenizer: PreTrainedTokenizerBase, steps: int, size: int, seed: int):
        self.pools, self.tokenizer, self.steps, self.size, self.seed = pools, tokenizer, steps, size, seed

    def __getitem__(self, step: int) -> Batch:
        rng = Random(f"denoiser {self.seed} {step}")
        late = step >= SMALL_UNTIL * self.steps
        bucket, scenes, start = self.pools[late].draw(rng, self.size if late else 2 * self.size)
        text = make_text_batch([describe(scene, rng) for scene in scenes], self.tokenizer, rng, NULL_SHARE)
        text = add_fillers(text, rng)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        timestep = draw_timesteps(len(start), generator, 1000)
        noise = torch.randn(start.shape, generator=generator)
        return Batch(start, text.ids, text.attended, text.kept, timestep, noise, (bucket.height_px, bucket.width_px))


class DenoiserStage(Resumable):
    """The denoiser and the text encoder, their optimiser and their averages."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        autoencoder: Autoencoder,
        pools: Sequence[Pool],
        *,
        steps: int,
        config: PixArtConfig = CONFIG,
        seed: int = 0,
        batch_size: int = 48,
        device: str = "cpu",
    ):
        torch.manual_seed(seed)
        self.tokenizer, self.autoencoder, self.device = tokenizer, autoencoder, torch.device(device)
        self._batches = Batches(pools, tokenizer, steps, batch_size, seed)
        self.diffusion = Diffusion()
        denoiser = PixArt(config, attention=attend_exactly)
        initialize_weights(denoiser)
        start_as_identity(denoiser)
        self.model = nn.ModuleDict({"denoiser": denoiser, "text": TrainedText(vocabulary(tokenizer))}).to(self.device)
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.99), weight_decay=0, foreach=True)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema = MovingAverage(trained, 0.998)

    def batches(self) -> Batches:
        """What `step` takes, by the step's number."""
        return self._batches

    def _groups(self) -> list[dict]:
        denoiser, text = self.model["denoiser"], self.model["text"]
        edges = [*denoiser.x_embedder.parameters(), *denoiser.final_layer.linear.parameters()]
        known = {id(p) for p in edges}
        body = [p for p in denoiser.parameters() if id(p) not in known]
        parts = {"edges": edges, "text": [p for p in text.parameters() if p.requires_grad], "body": body}
        return [{"params": part, "lr": (rate := LEARNING_RATES[name]), "full_lr": rate} for name, part in parts.items()]

    def _predict(self, model: nn.ModuleDict, batch: Batch, ids: Tensor, attended: Tensor, kept: Tensor) -> tuple:
        """The noisy latents and the prediction (B, 8, h, w) float32."""
        noisy = self.diffusion.q_sample(batch.start, batch.timestep, batch.noise)
        on_device = (value.to(self.device) for value in (noisy, batch.timestep.float(), ids, attended, kept))
        latents, timestep, ids, attended, kept = on_device
        size = torch.tensor([batch.size_px], dtype=torch.float32, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            states = model["text"](ids, attended)
            prediction = model["denoiser"](latents, timestep, states, kept, size, size[:, :1] / size[:, 1:])
        return noisy, prediction.float()

    def step(self, number: int, learning_rate_factor: float, progress: float, batch: Batch) -> dict[str, float]:
        noisy, prediction = self._predict(self.model, batch, batch.ids, batch.attended, batch.kept)
        losses = self.diffusion.training_losses(prediction.cpu(), batch.start, noisy, batch.timestep, batch.noise)
        # 1 / alpha_bar makes it the loss of the velocity, which weighs all noise levels alike.
        weight = (1 / self.diffusion.alphas_cumprod[batch.timestep]).clamp(max=MAX_WEIGHT).float()
        loss, bound = (weight * losses["mse"]).mean(), losses["vb"].clamp(max=MAX_BOUND).mean()
        self.optimizer.zero_grad()
        (loss + BOUND_WEIGHT * bound).backward()
        norm = clip_gradients(self.parameters, 1.0)
        factor = learning_rate_factor * min(1.0, (number + 1) / WARM_UP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        self.optimizer.step()
        self.ema.update()
        return {"loss": loss.item(), "bound": bound.item(), "gradient": norm, "pictures": len(batch.start)}

    def averaged(self) -> tuple[PixArt, T5EncoderModel]:
        """Copies with the averaged weights and the null caption filled in, for evaluation and export."""
        model = self._averaged()
        denoiser, text = model["denoiser"].cpu(), model["text"].cpu().fill_table()
        length = denoiser.config.caption_length
        ids = torch.tensor([[END] + [PAD] * (length - 1)])
        with torch.no_grad():
            states = text(input_ids=ids, attention_mask=(ids == END).long()).last_hidden_state
        denoiser.y_embedder.y_embedding.copy_(states[0])
        return denoiser, text

    def _averaged(self) -> nn.ModuleDict:
        model = deepcopy(self.model).requires_grad_(False).eval()
        self.ema.copy_to(dict(model.named_parameters()))
        return model

    @torch.no_grad()
    def measure(self, count: int = 32) -> dict[str, float]:
        """Whether captions are read (loss with another's caption over loss with its own), and the scorer's shares."""
        scenes = held_out_scenes(count, "measure")
        start = encode(self.autoencoder, scenes, 128, 128, self.device).float()
        text = make_text_batch([caption(scene) for scene in scenes], self.tokenizer)
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
        model, found = self._averaged(), {}
        for timestep in PROBED:
            batch = Batch(start, *[None] * 3, torch.full((count,), timestep), noise, (128, 128))
            errors = []
            for shift in (0, 2):
                rows = [part.roll(shift, 0) for part in (text.ids, text.attended, text.kept)]
                predicted = self._predict(model, batch, *rows)[1][:, :4].cpu()
                errors.append(float((predicted - noise).square().mean()))
            found[f"ratio_{timestep}"] = errors[1] / errors[0]
        return found | self._scores(scenes)

    def _scores(self, scenes: list) -> dict[str, float]:
        demo = DemoModel(*self.averaged(), deepcopy(self.autoencoder).cpu().float(), self.tokenizer)
        pictures = generate(demo, [caption(scene) for scene in scenes], steps=12)
        readings = [read(picture) for picture in pictures]
        shares = add_scores(score(reading, scene) for reading, scene in zip(readings, scenes, strict=True))
        return shares | {"error": sum(reading.error for reading in readings) / len(readings)}

    def export(self, denoiser_file: Path, text_file: Path) -> None:
        """Write the averaged weights as fp16 safetensors, the hyper-parameters in their metadata."""
        denoiser, text = self.averaged()
        export_models(denoiser, text, T5_FIELDS, denoiser_file, text_file)
