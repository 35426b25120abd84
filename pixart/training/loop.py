"""The training loop: steps, accumulation, clipping, averages, checkpoints, and stopping in a good state.

A training is a function of its settings, its data and the step's number: what is random is drawn from the number of the
forward pass and of the picture (`draws.py`), and a checkpoint is of the end of a step. A step that is cut off between
its forward passes is made again from its beginning.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ..data.buckets import BucketSampler
from ..data.examples import Batch, Example, FeatureSet, check_finite, collate, draw_example
from ..quoting import plain
from .adapters import tell_chances
from .draws import Chances, draw_batch, variant_chances
from .memory.piecewise import Piecewise
from .objectives import Objective
from .optimizers import MovingAverage, as_result, make_optimizer, rate_factor, set_rate
from .processes import SingleProcess, like, whole
from .report import Report
from .sanity import Sanity, TrainingDiverged
from .settings import TrainingSettings
from .state import CHECKPOINTS, Checkpoints, check_continues, check_origin, check_space
from .watching.best import Best, write_best
from .watching.held_out import HeldOut, choose_held_out
from .watching.speed import describe_memory
from .watching.timesteps import BINS, by_timestep

logger = logging.getLogger(__name__)

MAX_OVERFLOWS = 20  # steps in a row whose fp16 gradients overflow, each of which halves the loss scale
TIMESTEPS_EVERY = 100  # steps over which errors by timestep are taken together
CHECKPOINT_OVERHEAD = 2**20  # bytes of settings and numbers beside the tensors


@dataclass(frozen=True)
class Progress:
    """Where a training is. loss: of the last step; smoothed: of the last ones. seconds: per step, and to the end.

    validation: (step, validation loss) of the last one measured, best: of the lowest; None before the first.
    """

    step: int
    steps: int
    loss: float
    smoothed: float
    learning_rate: float
    seconds_per_step: float
    seconds_left: float
    validation: tuple[int, float] | None = None
    best: tuple[int, float] | None = None


class Events:
    """What the surroundings of a training want to know, and to say. All of it is optional.

    interruptions: by which they end a sampling at any place; the training then stops as `should_stop` stops it.
    """

    interruptions: tuple[type[BaseException], ...] = ()

    def stepped(self, progress: Progress) -> None:
        """After each step, in the first process."""

    def should_stop(self) -> bool:
        """Asked before each forward pass: True ends the training, with everything saved."""
        return False

    def interrupted(self) -> None:
        """After one of `interruptions`: from now on `should_stop` is to be True."""


class Trainer:
    """One training of one objective on one set of features, in one folder.

    folder: gets checkpoints, log and pictures. sample: makes validation pictures of the current weights, and gives them
    as one, None in a process that only takes part; called with the step's number, every sample_every steps.
    base: sketch of the model before the training (see data.sketches), which checkpoints are to agree with.
    start: identity of the LoRA that it began with, or None.
    held_out: pictures of a set of their own for the validation loss; None takes a share of the features, if any.
    """

    def __init__(
        self,
        objective: Objective,
        features: FeatureSet,
        settings: TrainingSettings,
        folder: Path,
        processes: SingleProcess | None = None,
        events: Events | None = None,
        sample: Callable[[int], Image.Image | None] | None = None,
        base: dict | None = None,
        start: str | None = None,
        held_out: FeatureSet | None = None,
    ):
        self.objective, self.features, self.settings, self.folder = objective, features, settings, Path(folder)
        self.base, self.data, self.start = base, features.identity, start
        self.processes, self.events, self.sample = processes or SingleProcess(), events or Events(), sample
        left_out = ()
        if held_out is None and settings.validation_share:
            left_out = choose_held_out(features, settings.validation_share, settings.seed)
        self.held_out = HeldOut(held_out, None, settings) if held_out is not None else None
        if len(left_out):
            self.held_out = HeldOut(features, left_out, settings)
        self.best, self.validation = Best(), None
        self.has_ended_early = False  # since the validation loss rose
        self.sampler = BucketSampler(
            features.bins,
            settings.batch_size,
            seed=settings.seed,
            world_size=self.processes.world_size,
            rank=self.processes.rank,
            is_prior=features.is_prior,
            repeats=getattr(features, "repeats", ()),
            blocks=getattr(features, "blocks", None),
            ahead=getattr(features, "fetch_ahead", None),
            held_out=left_out,
        )
        self.prepared, self.optimizer = self.processes.prepare(
            objective, lambda: make_optimizer(settings, _trained(objective))
        )
        self.parameters = _trained(objective)
        self.piecewise = None
        if settings.gradient_release or settings.offload_optimizer:
            self.piecewise = Piecewise(
                self.optimizer, self.parameters.values(), settings.gradient_release, settings.offload_optimizer
            )
        self.average = MovingAverage(self.parameters, settings.ema_decay) if settings.ema_decay else None
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, settings.keep_last)
        self.report = Report(self.folder, settings, is_main=self.processes.rank == 0)
        self.sanity = Sanity(objective.highest_error)
        is_half = settings.dtype == "fp16"
        self.scaler = torch.amp.GradScaler(self.processes.device.type, enabled=is_half, init_scale=2.0**14)
        self.step, self.saved_step, self.overflows, self.spent_s = 0, None, 0, 0.0
        self.is_whole = True  # False within an optimiser step
        self.is_stopping = False  # whether some process was asked to stop

    def run(self, resume: bool = True) -> int:
        """Train until the last step, or until stopped. Returns the steps that are done; everything is saved.

        resume: go on from the newest checkpoint in the folder; False takes the place of the training that is there.
        Raises TrainingDiverged when the loss is not a number or explodes; the weights are then those before the
        step. An exploding training keeps the last checkpoint from before.
        """
        settings = self.settings
        if not (resume and self._resume()):
            self.report.start(0)
        self.checkpoints.size_bytes = self._checkpoint_bytes()
        if self.processes.rank == 0:
            check_space(self.folder, self._checkpoint_bytes() * (1 + (settings.keep_last > 1)) + self._best_bytes())
            if not resume:  # or the next run would go on with those of the training before
                self.checkpoints.clear()
        self.objective.train()
        with contextlib.ExitStack() as ends:
            ends.callback(self.report.close)
            self._loader = ends.enter_context(ThreadPoolExecutor(1, "pixart-training-data"))
            self._ahead: Future | None = None
            try:
                self._train()
            except TrainingDiverged:
                raise
            except BaseException:  # also a keyboard interrupt and a full GPU: nothing that was trained is lost
                self._save_what_is_whole()
                raise
            self._save_at_end()
        return self.step

    @property
    def notes(self) -> list[str]:
        """What went wrong without ending the training, for the user to hear."""
        return [*self.checkpoints.notes, *self.report.notes]

    def _save_at_end(self):
        """What was trained goes into the result also where no checkpoint can be written any more."""
        try:
            self._save()
        except OSError as error:
            logger.warning("%s", error)
            self.checkpoints.notes.append(plain(str(error.strerror or error), 400))
            self.processes.wait()

    def _train(self):
        settings = self.settings
        if self.step == 0 and self.held_out:
            self._validate()
        if self.sample and settings.sample_every and self.step == 0:
            self._sample()
        while self.step < settings.steps:
            self.has_ended_early = bool(settings.patience) and self.best.since >= settings.patience
            if self.has_ended_early:
                logger.info("PixArt training ends after step %d: best validation at %d", self.step, self.best.step)
                return
            began = time.monotonic()
            if self.is_stopping or not self._make_step():
                logger.info("PixArt training is stopped after step %d of %d", self.step, settings.steps)
                return
            seconds = time.monotonic() - began
            self.spent_s += seconds
            is_last = self.step == settings.steps
            if self.held_out and (self.step % settings.validation_every == 0 or is_last):
                self._validate()
            self._tell(seconds)
            is_due = settings.checkpoint_every and self.step % settings.checkpoint_every == 0
            if is_due and self.sanity.is_calm:  # what is about to explode must not take the place of good states
                self._save()
            if self.sample and settings.sample_every and (self.step % settings.sample_every == 0 or is_last):
                self._sample()

    def _validate(self):
        """Measure the validation loss of what would be the result now, and keep the best."""
        self.objective.eval()
        with self.averaged():
            measured = self.held_out.measure(self.objective, self.prepared, self.processes)
            is_best = self.best.follow(self.step, measured.loss)
            if is_best and self.settings.keep_best and (self.processes.is_sharded or self.processes.rank == 0):
                weights = whole(self.parameters)
                note = write_best(self.folder, self.best, weights) if self.processes.rank == 0 else None
                self.checkpoints.notes += [note] if note else []
        self.processes.release(self.prepared)
        self.objective.train()
        self.validation = (self.step, measured.loss)
        self.report.validate(self.step, measured.loss, measured.by_timestep)
        self.processes.wait()

    def _make_step(self) -> bool:
        """One optimiser step. Returns False, with nothing changed, when the training is to stop.

        Several processes stop after the step, as they have to agree on it.
        """
        count = self.settings.accumulation
        self.optimizer.zero_grad(set_to_none=True)
        set_rate(self.optimizer, self.rate())
        sums = torch.zeros(3 + 2 * BINS, device=self.processes.device)
        for index in range(count):
            stops = self.events.should_stop()
            if stops and self.processes.world_size == 1:
                self.optimizer.zero_grad(set_to_none=True)
                return False
            loss, timestep = self._forward(self.step * count + index, index == count - 1)
            sums[:2] += torch.stack([loss.total.detach().float(), loss.error.detach().float()]) / count
            sums[2] += float(stops)
            if loss.each is not None:
                sums[3:] += by_timestep(loss.each.float(), timestep).flatten()
        norm = self._clip()
        # The step's only wait for the device: weights must not change before this is known to be sane.
        numbers = torch.cat([self.processes.mean(sums), norm.reshape(1).float()]).tolist()
        self.loss, self.error, self.is_stopping, self.norm = numbers[0], numbers[1], numbers[2] > 0, numbers[-1]
        self._check_sane()
        self._update()
        self.report.timesteps.add(numbers[3:-1])
        return True

    def _clip(self) -> Tensor:
        """The norm of the gradients before they are cut to the largest one, also of those that were let go of."""
        if self.settings.gradient_release:
            return self.piecewise.take_norm(self.processes.device)
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _forward(self, number: int, is_last: bool):
        batch, draws = self._next_batch(number)
        objective = self.objective
        if self.settings.dropout:
            tell_chances(objective, Chances(f"{self.settings.seed} {number}", self._positions(batch)))
        with self.processes.accumulating(self.prepared, is_last):
            with torch.autocast(self.processes.device.type, objective.dtype, enabled=objective.autocast):
                loss = self.prepared(batch, draws)
            if self.settings.gradient_release:
                self._begin_release(loss)
            self.scaler.scale(loss.total / self.settings.accumulation).backward()
        return loss, draws.timestep

    def _begin_release(self, loss):
        """Before a backward pass that changes the weights: its loss has to be a number."""
        self.loss, self.error = loss.total.item(), loss.error.item()
        self.norm = 0.0
        if not math.isfinite(self.loss):
            self._check_sane()
        self.is_whole = False

    def _update(self):
        self.is_whole = False
        if self.piecewise is None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif not self.piecewise.is_released:
            self.piecewise.step()
        self.objective.finish_step()
        if self.average is not None:
            self.average.update()
        self.step += 1
        self.is_whole = True

    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.settings.learning_rate * rate_factor(self.settings, self.step)

    def _check_sane(self):
        if not math.isfinite(self.loss) or (not math.isfinite(self.norm) and not self._overflowed()):
            if self.sanity.is_calm:
                self._save_what_is_whole()
            raise TrainingDiverged(
                f"Loss is not a number: got loss {self.loss:g} and gradients of norm {self.norm:g} in step "
                f"{self.step + 1}, expected finite ones. {self._advice()} If that does not help, set dtype to bf16 or "
                f"fp32."
            )
        if not self.sanity.follow(self.error):
            raise TrainingDiverged(
                f"Loss exploded: got an error of {self.sanity.mean:.3g} on average at step {self.step + 1}, expected "
                f"at most {self.sanity.limit:.3g}. {self._advice()}"
            )

    def _advice(self) -> str:
        rate, kept = self.settings.learning_rate, self.checkpoints.all()
        state = f"the last good one is {kept[-1].name} in '{self.checkpoints.folder}'" if kept else "none is kept yet"
        return (
            f"Lower the learning rate (now {rate:g}) or raise the warm-up, and resume or start again. Of the states "
            f"until then, {state}."
        )

    def _overflowed(self) -> bool:
        """Whether gradients beyond fp16 are the loss scale's affair: it skips the step and is halved."""
        self.overflows += 1
        return self.scaler.is_enabled() and self.overflows <= MAX_OVERFLOWS

    def _tell(self, seconds: float):
        if math.isfinite(self.norm):
            self.overflows = 0
        rate = self.optimizer.param_groups[0]["lr"]
        left = seconds * (self.settings.steps - self.step)
        pictures = self.settings.batch_size * self.settings.accumulation * self.processes.world_size
        more = {"pictures_per_second": pictures / max(seconds, 1e-9), "seconds_left": left}
        more |= describe_memory(self.processes.device)
        if self.step % TIMESTEPS_EVERY == 0 or self.step == self.settings.steps:
            self.report.close_timesteps(self.step)
        smoothed = self.report.log(self.step, self.loss, self.error, self.norm, rate, seconds, more)
        if self.processes.rank == 0:
            per_step = self.report.seconds_per_step
            left = per_step * (self.settings.steps - self.step)
            best = None if self.validation is None else (self.best.step, self.best.loss)
            self.events.stepped(
                Progress(
                    *(self.step, self.settings.steps, self.loss, smoothed, rate, per_step, left),
                    validation=self.validation,
                    best=best,
                )
            )

    def _sample(self):
        if self.processes.is_sharded or self.processes.rank == 0:
            self.objective.eval()
            pictures = None
            try:
                with self.averaged(), torch.no_grad():
                    pictures = self.sample(self.step)
            except self.events.interruptions:
                self.events.interrupted()
            if pictures is not None:
                self.report.picture(self.step, "validation", pictures)
            self.processes.release(self.prepared)
            self.objective.train()
        self.processes.wait()

    @contextlib.contextmanager
    def holding(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Within it the parameters have these values, given as `trained_weights` gives them."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        with torch.no_grad():
            _copy(weights, self.parameters)
            try:
                yield
            finally:
                _copy(own, self.parameters)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the weights are what would be the result: their average, where there is one."""
        with as_result(self.optimizer) if self.average is None else self.average.swapped_in():
            yield

    def trained_weights(self) -> dict[str, Tensor]:
        """The result: every trained parameter by its name in the objective, averaged where asked, on the CPU."""
        with self.averaged():
            return whole(self.parameters)

    def _next_batch(self, number: int):
        """The batch of forward pass `number`, on the device; the one after it is prepared meanwhile."""
        ready, self._ahead = self._ahead or self._loader.submit(self._load, number), None
        batch, draws = ready.result()
        if number + 1 < self.settings.steps * self.settings.accumulation:
            self._ahead = self._loader.submit(self._load, number + 1)
        return batch.to(self.processes.device), draws.to(self.processes.device)

    def _load(self, number: int):
        chosen = next(self.sampler)
        places = self._positions(chosen)
        examples = [self._draw(number, *each) for each in zip(places, chosen, strict=True)]
        batch = collate(examples)
        shape = batch.latent.shape[1:]
        return batch, draw_batch(self.settings, number, places, shape, self.objective.grid)

    def _draw(self, number: int, position: int, index: int) -> Example:
        example = draw_example(self.features, index, variant_chances(self.settings, number, position))
        return check_finite(example, self.features.name_of(index))

    def _positions(self, batch: Batch | Sequence[int]) -> range:
        """The places of this process's pictures in the global batch."""
        first = self.processes.rank * len(batch)
        return range(first, first + len(batch))

    def _resume(self) -> bool:
        """Go on from the newest checkpoint; False without one."""
        state = self.checkpoints.load()
        if state is None:
            return False
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        check_continues(state, self.settings, shapes)
        check_origin(state, self.data, self.base, self.start)
        self.step = self.saved_step = state["step"]
        self.spent_s = state["seconds"]
        forwards = self.step * self.settings.accumulation
        epoch, position = divmod(forwards, self.sampler.batches_per_epoch)
        self.sampler.load_state_dict({**state["sampler"], "epoch": epoch, "position": position})
        with torch.no_grad():
            _copy(state["parameters"], self.parameters)
            _copy(state["extra"], self.objective.extra_state())
        self._load_optimizer(state["optimizer"])
        if self.average is not None:
            self.average.updates = state["average"]["updates"]
            _copy(state["average"]["shadow"], self.average.shadow)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.sanity.load_state_dict(state["sanity"])
        self.best = Best(**state.get("best", {}))
        self.validation = state.get("validation")
        self.report.start(self.step, state.get("report"))
        logger.info("PixArt training goes on after step %d", self.step)
        return True

    def _load_optimizer(self, state: dict):
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, values in state["state"].items():
            target = parameters[index]
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == target.shape:
                    values[name] = like(value, target)
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.settings.weight_decay
        if self.piecewise is not None:
            self.piecewise.put_away()

    def _state(self) -> dict:
        average = None if self.average is None else whole(self.average.state_dict())
        return {
            "step": self.step,
            "seconds": self.spent_s,
            "settings": self.report.settings,
            "data": self.data,
            "base": self.base,
            "start": self.start,
            "sampler": self._sampler_identity(),
            "parameters": whole(self.parameters),
            "extra": whole(self.objective.extra_state()),
            "optimizer": whole(self.optimizer.state_dict()),
            "average": average,
            "scaler": self.scaler.state_dict(),
            "sanity": self.sanity.state_dict(),
            "best": self.best.state(),
            "validation": self.validation,
            "report": self.report.state(),
        }

    def _sampler_identity(self) -> dict:
        """What identifies the data; its position is that of the step, as the batch ahead is drawn already."""
        return {key: value for key, value in self.sampler.state_dict().items() if key not in ("epoch", "position")}

    def _save(self):
        """Write a checkpoint, unless there is one of this step; every process takes part where weights are sharded."""
        if self.saved_step == self.step:
            return
        if self.processes.is_sharded or self.processes.rank == 0:
            state = self._state()
            if self.processes.rank == 0:
                self.checkpoints.save(self.step, state)
        self.saved_step = self.step
        self.processes.wait()

    def _save_what_is_whole(self):
        """After a failure: a checkpoint of the last step, where its weights are not half updated and one can write."""
        if not self.is_whole or self.step == 0 or self.saved_step == self.step or self.processes.is_sharded:
            return
        if self.processes.rank == 0:
            try:
                self.checkpoints.save(self.step, self._state())
            except (OSError, RuntimeError) as error:  # the failure that brought us here is the one to report
                logger.warning("No checkpoint could be written after the failure: %s", error)

    def _checkpoint_bytes(self) -> int:
        """About the size of one: weights, the optimiser's two moments, and the average, all fp32."""
        copies = 3 + (self.average is not None)
        numbers = sum(p.numel() for p in self.parameters.values()) * copies
        numbers += sum(tensor.numel() for tensor in self.objective.extra_state().values())
        return 4 * numbers + CHECKPOINT_OVERHEAD

    def _best_bytes(self) -> int:
        is_kept = self.held_out is not None and self.settings.keep_best
        return 4 * sum(p.numel() for p in self.parameters.values()) if is_kept else 0


def _trained(objective: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}


def _copy(values: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(like(values[name], target))
