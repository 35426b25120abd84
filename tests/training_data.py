"""A tiny model and encoded pictures for it, for the tests of training."""

import math
from random import Random

import torch

from pixart_pack.pixart.data.examples import Example, ListFeatures, collate
from pixart_pack.pixart.training.draws import draw_batch
from pixart_pack.pixart.training.loop import Events
from pixart_pack.pixart.training.settings import TrainingSettings
from pixart_pack.tests.tiny_pixart import make_model, tiny_config

WIDTH = tiny_config().caption_channels
SIZES = ((8, 8), (6, 10))


def make_features(count=10, hint=False, seed=0, sizes=SIZES, prior=()) -> ListFeatures:
    """Pictures of several sizes with captions of several lengths."""
    generator, rng = torch.Generator().manual_seed(seed), Random(seed)

    def tensor(*shape):
        return torch.randn(shape, generator=generator)

    examples = []
    for index in range(count):
        height, width = sizes[index % len(sizes)]
        examples.append(
            Example(
                latent=tensor(4, height, width) * 5,
                caption=tensor(rng.randint(2, 7), WIDTH),
                size_px=(height * 8, width * 8),
                aspect_ratio=height / width,
                deviation=torch.full((4, height, width), 0.1),
                hint=tensor(4, height, width) if hint else None,
                is_prior=index in prior,
            )
        )
    return ListFeatures(examples, null_caption=tensor(1, WIDTH))


def tiny_settings(**fields) -> TrainingSettings:
    """Settings of a training of seconds."""
    usual = {"steps": 6, "batch_size": 2, "rank": 2, "learning_rate": 1e-3, "tensorboard": False, "log_every": 1}
    return TrainingSettings(**{**usual, **fields})


def tiny_model(**fields):
    """A model in float32 with random weights everywhere."""
    return make_model(tiny_config(**fields))


def predict(model, objective):
    """What a model predicts for a batch of two with an objective's conditions, without gradients."""
    features = make_features(count=2, sizes=((8, 8),))
    batch = collate([features[0], features[1]])
    draws = draw_batch(tiny_settings(), 0, range(2), batch.latent.shape[1:])
    with torch.no_grad():
        return model(draws.noise, draws.timestep.float(), **objective.conditioned(batch, draws.dropped))


class StopAt(Events):
    """Stops a training after so many steps, and keeps what it was told of each."""

    def __init__(self, step=math.inf):
        self.step, self.seen = step, []

    def stepped(self, progress):
        self.seen.append(progress)

    def should_stop(self):
        return len(self.seen) >= self.step


def interrupting(count):
    """(what was told, a progress that is told it and interrupts when so many are done)."""
    seen = []

    def progress(done, total, picture):
        seen.append((done, total, picture))
        if done >= count:
            raise KeyboardInterrupt

    return seen, progress
