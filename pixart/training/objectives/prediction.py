"""Noise prediction, as PixArt itself was trained, and with a ControlNet."""

import torch
from torch import Tensor, distributed, nn

from ...data.examples import Batch
from ..adapters import AdaptedLinear, adapters_disabled
from ..draws import Draws
from .base import Conditions, Loss, Objective, huber


class NoisePrediction(Objective):
    """PixArt's own training: predict the noise, and the variance when train_variance.

    Source: PixArt-alpha, arXiv 2310.00426; prior preservation: DreamBooth, arXiv 2208.12242.
    """

    def forward(self, batch: Batch, draws: Draws) -> Loss:
        start = self.start(batch, draws)
        noisy = self.diffusion.q_sample(start, draws.timestep, draws.noise)
        inputs = noisy.to(self.dtype), draws.timestep.float(), self.conditioned(batch, draws.dropped)
        target = self.target(*inputs, batch, draws)
        prediction = self.predict(*inputs, batch)
        return self.compare(prediction.float(), target, start, noisy, batch, draws.timestep)

    def target(self, noisy: Tensor, timestep: Tensor, conditions: Conditions, batch: Batch, draws: Draws) -> Tensor:
        """The noise that is to be predicted, (B, C, h, w) fp32."""
        return draws.noise

    def predict(self, noisy: Tensor, timestep: Tensor, conditions: Conditions, batch: Batch) -> Tensor:
        """The model's output, (B, C_out, h, w)."""
        return self.model(noisy, timestep, **conditions)

    def compare(
        self, prediction: Tensor, noise: Tensor, start: Tensor, noisy: Tensor, batch: Batch, timestep: Tensor
    ) -> Loss:
        """The weighted mean over the batch. prediction: (B, C or 2C, h, w) fp32; noise: what it should be."""
        settings = self.settings
        if not settings.train_variance:
            prediction = prediction[:, : start.shape[1]]
        region = self.region(batch)
        losses = self.diffusion.training_losses(prediction, start, noisy, timestep, noise, region=region)
        main, bound = losses["mse"], losses.get("vb")
        if settings.loss == "huber":
            main = huber(prediction[:, : start.shape[1]] - noise, settings.huber_c, region=region)
        total = self.weights[timestep] * main
        if bound is not None:
            total = total + bound
        importance = self.importance(batch, torch.where(batch.is_prior, settings.prior_weight, 1.0))
        each = losses["mse"]
        return Loss((importance * total).mean(), each.mean(), None if bound is None else bound.mean(), each.detach())


class PreservingPrediction(NoisePrediction):
    """Noise prediction in which the adapters may not change what the model predicts for prior pictures.

    The frozen model's own prediction has no chance in it, as the noise has, and is met exactly at the start.
    """

    def __init__(self, model, settings, dtype, null_caption, adapters: dict[str, AdaptedLinear]):
        super().__init__(model, settings, dtype, null_caption)
        self.adapters = adapters

    @torch.no_grad()
    def target(self, noisy, timestep, conditions, batch, draws):
        rows = batch.is_prior.nonzero()[:, 0]
        if not len(rows) and not (distributed.is_available() and distributed.is_initialized()):
            return draws.noise
        asked = rows if len(rows) else rows.new_zeros(1)  # all processes gather sharded weights, or none may
        conditions = {name: None if value is None else value[asked] for name, value in conditions.items()}
        with adapters_disabled(self.adapters):
            own = self.model(noisy[asked], timestep[asked], **conditions)
        return draws.noise.index_copy(0, rows, own[: len(rows), : noisy.shape[1]].float())


class ControlPrediction(NoisePrediction):
    """Noise prediction through a frozen base with a trained ControlNet. Source: PixArt-delta, arXiv 2401.05252."""

    def __init__(self, model, settings, dtype, null_caption, control: nn.Module):
        super().__init__(model, settings, dtype, null_caption)
        self.control = control

    def predict(self, noisy, timestep, conditions, batch):
        if batch.hint is None:
            raise ValueError(
                "Control pictures are missing: got a dataset without them, expected one for each picture. Encode the "
                "dataset with control pictures."
            )
        hint = (batch.hint.float() * self.vae_scale).to(self.dtype)
        return self.model(noisy, timestep, control=self.control.attach(self.model, hint), **conditions)
