"""Training the demo's PixArt and its T5 encoder together, from nothing or from trained weights."""

import json
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ..pixart.config import PixArtConfig
from ..pixart.diffusion import Diffusion
from ..pixart.layers import attend, split_heads
from ..pixart.training.optimizers import MovingAverage
from ..pixart.transformer import PixArt, initialize_weights
from .autoencoder import VAE_SCALE, Autoencoder
from .generate import DemoModel, generate
from .loop import Resumable, Together, clip_gradients
from .pool import FULL_BUCKETS, LATER_BUCKETS, SMALL_BUCKETS, Bucket, Pool
from .scenes import caption, describe, random_scene
from .scorer import add_scores, score
from .text import END, PAD, T5_FIELDS, TrainedText, make_text_batch

CONFIG = PixArtConfig(
    depth=6,
    hidden_size=144,
    num_heads=4,
    mlp_ratio=2.0,
    caption_channels=T5_FIELDS["d_model"],
    base_size=8,
    pe_scale=1.0,
    vae_scale=VAE_SCALE,
)
NULL_SHARE = 0.1
MAX_WEIGHT = 200.0
MAX_PICTURE_WEIGHT = 6.0
BOUND_WEIGHT = 0.003
MAX_BOUND = 20.0  # bits; the first timesteps' likelihood has outliers
LEARNING_RATES = {"matrices": 1.5e-3, "edges": 4e-4, "text": 1e-3, "body": 1.5e-3}
WARM_UP_STEPS = 150


@dataclass(frozen=True)
class Plan:
    """What a run shows the model, and how fast.

    first, then: the buckets of the first share `small_until` of the run, at twice the batch, and of the rest.
    hold: share of the run at the full learning rates, which are LEARNING_RATES times `rate`. middle: of the timesteps,
    see `draw_timesteps`.
    """

    first: tuple[Bucket, ...] = SMALL_BUCKETS
    then: tuple[Bucket, ...] = FULL_BUCKETS
    small_until: float = 0.35
    hold: float = 0.6
    rate: float = 1.0
    middle: float = 0.6


FROM_NOTHING = Plan()
FROM_WEIGHTS = Plan(LATER_BUCKETS, LATER_BUCKETS, small_until=0.0, hold=0.3, rate=0.6, middle=0.45)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """`layers.attend` in separate steps: on processors the fused one's backward is ten times slower in bfloat16."""
    q, k, v = (split_heads(part, num_heads).contiguous() for part in (q, k, v))  # (B, heads, N, D / heads)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # (B, heads, N, L)
    weights = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


@torch.no_grad()
def start_as_identity(model: PixArt) -> None:
    """Make the fresh model's predicted noise its input: at most timesteps that is nearly right already.

    Patches go into channels that the position grid leaves free, and the output layer reads them back.
    """
    config = model.config
    width, patch = config.hidden_size, config.patch_size**2 * config.in_channels
    grids = [model.positions(grid, torch.float32, "cpu")[0] for grid in ((8, 8), (6, 10), (10, 6), (4, 4))]
    taken = torch.cat([*grids, torch.ones(1, width)])
    free = torch.linalg.svd(taken.double(), full_matrices=True).Vh[-patch:].float()  # (patch, D), orthonormal rows
    scale = 0.7
    model.x_embedder.proj.weight.copy_((free.T * scale).reshape(model.x_embedder.proj.weight.shape))
    model.x_embedder.proj.bias.zero_()
    tokens = grids[0] + torch.randn(64, patch, generator=torch.Generator().manual_seed(0)) @ free * scale
    deviation = tokens.std(1, unbiased=False).mean()
    side = config.patch_size
    read = (free * deviation / scale).reshape(config.in_channels, side, side, width).permute(1, 2, 0, 3)
    model.final_layer.linear.weight.zero_()
    rows = model.final_layer.linear.weight.view(side, side, config.out_channels, width)
    rows[:, :, : config.in_channels] = read
    model.final_layer.scale_shift_table.zero_()
    for block in model.blocks:
        for branch in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
            branch.weight.zero_()
        block.scale_shift_table[[2, 5]] = 1  # gates


def draw_timesteps(count: int, generator: torch.Generator, steps: int, middle: float = 0.6) -> Tensor:
    """Half uniform, half around `middle` of the steps: at 0.6 the layout is decided, at 0.45 the shapes."""
    uniform = torch.rand(count, generator=generator) * steps
    around = (middle + 0.16 * torch.randn(count, generator=generator)) * steps
    timestep = torch.where(torch.rand(count, generator=generator) < 0.5, uniform, around)
    return timestep.long().clamp(0, steps - 1)


def _make_optimizers(model: nn.ModuleDict) -> Together:
    """Muon for the blocks' matrices, which it teaches more by a step than Adam, and AdamW for all the rest.

    Every group keeps its full learning rate as `full_lr`.
    """
    denoiser = model["denoiser"]
    edges = {id(p) for p in (*denoiser.x_embedder.parameters(), *denoiser.final_layer.linear.parameters())}
    blocks = [*denoiser.blocks, *model["text"].encoder.encoder.block]
    layers = (layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear))
    matrices = {id(layer.weight) for layer in layers}
    parts: dict[str, list[Tensor]] = {"matrices": [], "edges": [], "text": [], "body": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rest = "edges" if id(p) in edges else "text" if name.startswith("text.") else "body"
            parts["matrices" if id(p) in matrices else rest].append(p)
    groups = [{"params": part, "lr": (rate := LEARNING_RATES[name]), "full_lr": rate} for name, part in parts.items()]
    # The step has the size of one of Adam's, so that its learning rate is one of Adam's too.
    muon = torch.optim.Muon(groups[:1], weight_decay=0, adjust_lr_fn="match_rms_adamw")
    return Together(muon, torch.optim.AdamW(groups[1:], betas=(0.9, 0.99), weight_decay=0, foreach=True))


class DenoiserStage(Resumable):
    """The denoiser and the text encoder, their optimiser and their averages."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pool_folder: Path,
        *,
        config: PixArtConfig = CONFIG,
        seed: int = 0,
        batch_size: int = 48,
        ema_decay: float = 0.995,
        plan: Plan = FROM_NOTHING,
        half: bool = False,
        autoencoder: Autoencoder | None = None,
    ):
        """half: compute in bfloat16. autoencoder: for `measure`."""
        torch.manual_seed(seed)
        self.tokenizer, self.seed, self.batch_size = tokenizer, seed, batch_size
        self.plan, self.half, self.autoencoder = plan, half, autoencoder
        self.pools = [Pool(group, pool_folder, seed) for group in dict.fromkeys((plan.first, plan.then))]
        self.diffusion = Diffusion()
        denoiser = PixArt(config, attention=attend_plainly if half else None)
        initialize_weights(denoiser)
        start_as_identity(denoiser)
        every_word = Random("words")
        words = [describe(scene, every_word) for scene in self.pools[-1].scenes[0][:2000]]
        self.model = nn.ModuleDict({"denoiser": denoiser, "text": TrainedText(tokenizer, words)})
        self._prepare(ema_decay)

    def _prepare(self, ema_decay: float) -> None:
        """Fresh optimisers, and an average that starts at the weights as they are."""
        self.optimizer = _make_optimizers(self.model)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema = MovingAverage(trained, ema_decay)

    def start_from(self, denoiser: PixArt, text: T5EncoderModel) -> None:
        """Take over trained weights, in place of fresh ones."""
        self.model["denoiser"].load_state_dict(denoiser.state_dict())
        self.model["text"].start_from(text)
        self._prepare(self.ema.decay)

    def _losses(self, rng: Random, progress: float) -> tuple[Tensor, Tensor]:
        """Weighted losses of one batch: of the noise and of the variance."""
        bucket, scenes, start = self.pools[-1 if progress >= self.plan.small_until else 0].draw(
            rng, self._batch(progress)
        )
        captions = [describe(scene, rng) for scene in scenes]
        text = make_text_batch(captions, self.tokenizer, rng, NULL_SHARE)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        timestep = draw_timesteps(len(start), generator, len(self.diffusion.betas), self.plan.middle)
        noise = torch.randn(start.shape, generator=generator)
        noisy = self.diffusion.q_sample(start, timestep, noise)
        size = torch.tensor([[bucket.height_px, bucket.width_px]], dtype=torch.float32)
        ratio = size[:, :1] / size[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            states = self.model["text"](text)
            prediction = self.model["denoiser"](noisy, timestep.float(), states, text.kept, size, ratio)
        losses = self.diffusion.training_losses(prediction.float(), start, noisy, timestep, noise)
        return (self._weights(timestep) * losses["mse"]).mean(), losses["vb"].clamp(max=MAX_BOUND).mean()

    def _weights(self, timestep: Tensor) -> Tensor:
        """Of the noise's losses: (B,) float32.

        1 / alpha_bar makes it the loss of the velocity, which weighs all noise levels alike. Where there is hardly any
        noise nobody can tell it from the picture, so the weight of the picture's own error is limited.
        """
        kept = self.diffusion.alphas_cumprod[timestep]
        of_picture = (1 / (1 - kept)).clamp(max=MAX_PICTURE_WEIGHT)  # the velocity's loss over the picture's
        return (of_picture * (1 - kept) / kept).clamp(max=MAX_WEIGHT).float()

    def _batch(self, progress: float) -> int:
        return self.batch_size * 2 if progress < self.plan.small_until else self.batch_size

    def step(self, number: int, learning_rate_factor: float, progress: float) -> dict[str, float]:
        rng = Random(f"denoiser {self.seed} {number}")
        noise_loss, bound = self._losses(rng, progress)
        self.optimizer.zero_grad()
        (noise_loss + BOUND_WEIGHT * bound).backward()
        norm = clip_gradients(self.parameters, 1.0)
        factor = self.plan.rate * learning_rate_factor * min(1.0, (number + 1) / WARM_UP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor
        self.optimizer.step()
        self.ema.update()
        return {"loss": noise_loss.item(), "bound": bound.item(), "gradient": norm}

    def measure(self, count: int = 60) -> dict[str, float]:
        """The scorer's shares for pictures of held-out scenes of one to three shapes. Needs the autoencoder."""
        if self.autoencoder is None:
            return {}
        rng = Random("measure")
        scenes = [random_scene(rng, 1 + k % 3, held_out=True) for k in range(count)]
        model = DemoModel(*self.averaged(), self.autoencoder, self.tokenizer)
        pictures = generate(model, [caption(scene) for scene in scenes])
        return add_scores(score(*pair) for pair in zip(pictures, scenes, strict=True))

    def averaged(self) -> tuple[PixArt, T5EncoderModel]:
        """Copies with the averaged weights and the null caption filled in, for evaluation and export."""
        model = deepcopy(self.model).requires_grad_(False).eval()
        self.ema.copy_to(dict(model.named_parameters()))
        denoiser, text = model["denoiser"], model["text"].fill_table()
        denoiser.attention = attend
        length = denoiser.config.caption_length
        ids = torch.tensor([[END] + [PAD] * (length - 1)])
        with torch.no_grad():
            states = text(input_ids=ids, attention_mask=(ids == END).long()).last_hidden_state
        denoiser.y_embedder.y_embedding.copy_(states[0])
        return denoiser, text

    def export(self, denoiser_file: Path, text_file: Path) -> None:
        """Write the averaged weights as fp16 safetensors, the hyper-parameters in their metadata."""
        denoiser, text = self.averaged()
        export_models(denoiser, text, T5_FIELDS, denoiser_file, text_file)


def export_models(denoiser: PixArt, text: T5EncoderModel, fields: dict, denoiser_file: Path, text_file: Path) -> None:
    """Write both as fp16 safetensors, the hyper-parameters in their metadata. fields: the text encoder's."""
    for module, path, metadata in (
        (denoiser, denoiser_file, {"pixart_config": json.dumps(asdict(denoiser.config))}),
        (text, text_file, {"t5_config": json.dumps(fields)}),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {key: value.half().contiguous() for key, value in module.state_dict().items()}
        state.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
        save_file(state, path, metadata)
