"""The loop: continued runs bit by bit, stopping, accumulation, averages, divergence, full disks."""

import errno
import json
import sys
from dataclasses import replace

import pytest
import torch

import pixart_pack.pixart.training.state as state_module
from pixart_pack.pixart.data.buckets import BucketSampler
from pixart_pack.pixart.data.examples import ListFeatures
from pixart_pack.pixart.training.build import make_objective
from pixart_pack.pixart.training.loop import Events, Trainer
from pixart_pack.pixart.training.report import LOG, read_log
from pixart_pack.pixart.training.run import train
from pixart_pack.pixart.training.sanity import Sanity, TrainingDiverged
from pixart_pack.pixart.training.settings import CHECKPOINTING, OPTIMIZERS
from pixart_pack.pixart.training.state import Checkpoints
from pixart_pack.tests.training_data import make_features, tiny_model, tiny_settings

PACKAGES = {"adamw8bit": "bitsandbytes", "came": "came_pytorch", "prodigy": "prodigyopt", "lion": "lion_pytorch",
            "schedulefree": "schedulefree"}  # fmt: skip
KINDS = ("lora", "full", "controlnet", "lcm", "lcm_lora", "dmd", "dmd_lora")


class StopAfter(Events):
    """Stops before forward pass number `forwards`."""

    def __init__(self, forwards):
        self.left = forwards
        self.seen = []

    def should_stop(self):
        self.left -= 1
        return self.left < 0

    def stepped(self, progress):
        self.seen.append(progress)


def trainer(folder, settings, events=None, features=None, **more):
    features = features or make_features(hint=True)
    return Trainer(make_objective(tiny_model(), settings), features, settings, folder, events=events, **more)


def trained(folder, settings, **more):
    made = trainer(folder, settings, **more)
    made.run()
    return made.trained_weights()


def assert_same(weights, expected):
    assert weights.keys() == expected.keys() and weights
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name


def losses(folder):
    return {entry["step"]: entry["loss"] for entry in read_log(folder / LOG)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_something(kind, tmp_path):
    made = trainer(tmp_path, tiny_settings(kind=kind, warmup_steps=2, schedule="cosine"))
    before = {name: parameter.detach().clone() for name, parameter in made.parameters.items()}
    assert made.run() == 6
    changed = [name for name, value in made.trained_weights().items() if not torch.equal(value, before[name])]
    # A LoRA's first matrix gets its gradients from the second, which begins at zero but has moved after a step.
    assert set(changed) == set(before)
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


class Halt(BaseException):
    """What a host raises out of anything that it computes."""


class Halting(Events):
    """Its host is halted while the pictures of a step are made."""

    interruptions = (Halt,)

    def __init__(self):
        self.is_halted = False

    def interrupted(self):
        self.is_halted = True

    def should_stop(self):
        return self.is_halted


@pytest.mark.parametrize("halt_at", [0, 2])
def test_an_interruption_while_pictures_are_made_stops_the_training_with_all_that_is_whole(halt_at, tmp_path):
    settings = tiny_settings(sample_every=1, ema_decay=0.9, dropout=0.1, steps=4)

    def sample(step):
        if step == halt_at:
            raise Halt

    whole = trained(tmp_path / "whole", settings)
    stopped = trainer(tmp_path / "cut", settings, Halting(), sample=sample)
    assert stopped.run() == halt_at and stopped.objective.training
    assert_same(trained(tmp_path / "cut", settings), whole)
    with pytest.raises(Halt):  # where nobody says that it is an interruption
        trained(tmp_path / "other", settings, sample=sample)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forwards", [2, 5])  # at the end of a step, and between its forward passes
def test_a_run_that_was_cut_continues_bit_by_bit(kind, forwards, tmp_path):
    settings = tiny_settings(kind=kind, accumulation=2, ema_decay=0.9, dropout=0.1, warmup_steps=2, steps=5)
    whole = trained(tmp_path / "whole", settings)
    stopped = trainer(tmp_path / "cut", settings, StopAfter(forwards))
    assert stopped.run() == forwards // 2
    assert_same(trained(tmp_path / "cut", settings), whole)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


class Varied(ListFeatures):
    """Pictures with four variants each, which are shown 1.5 times an epoch, and masks and weights."""

    def __init__(self):
        plain = make_features()
        masks = (torch.arange(each.latent[:1].numel()).reshape(each.latent[:1].shape) % 2 for each in plain.examples)
        examples = [replace(each, mask=mask, weight=0.5) for each, mask in zip(plain.examples, masks, strict=True)]
        super().__init__(examples, plain.null_caption)
        self.repeats, self.drawn = [1.5] * len(self), []

    def draw(self, index, rng):
        self.drawn.append((index, rng.randrange(4)))
        return replace(self[index], latent=self[index].latent + self.drawn[-1][1])


@pytest.mark.slow
def test_variants_repeats_and_masks_continue_bit_by_bit(tmp_path):
    settings, features, again = tiny_settings(steps=12), Varied(), Varied()
    whole = trained(tmp_path / "whole", settings, features=features)
    trainer(tmp_path / "cut", settings, StopAfter(7), features=again).run()
    assert_same(trained(tmp_path / "cut", settings, features=again), whole)
    assert {variant for _, variant in features.drawn} == {0, 1, 2, 3} and set(features.drawn) == set(again.drawn)
    plain = trained(tmp_path / "plain", settings, features=make_features())
    assert not all(torch.equal(plain[name], whole[name]) for name in whole)
    pair = [trainer(tmp_path / f"{rank}", replace(settings, batch_size=1), features=Varied()) for rank in range(2)]
    for rank, each in enumerate(pair):
        each.sampler.world_size, each.sampler.rank, each.processes.rank = 2, rank, rank
        each.sampler = BucketSampler(each.features.bins, 1, 0, False, 2, rank, repeats=each.features.repeats)
        for number in range(12):
            each._load(number)
    shared = [drawn for two in zip(*(each.features.drawn for each in pair), strict=True) for drawn in two]
    assert shared == features.drawn[:24]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_continues_bit_by_bit(optimizer, kind, tmp_path):
    pytest.importorskip(PACKAGES.get(optimizer, "torch"))
    schedule = "constant" if optimizer == "schedulefree" else "linear"
    settings = tiny_settings(optimizer=optimizer, kind=kind, steps=5, schedule=schedule)
    whole = trained(tmp_path / "whole", settings)
    trainer(tmp_path / "cut", settings, StopAfter(3)).run()
    assert_same(trained(tmp_path / "cut", settings), whole)


@pytest.mark.parametrize("optimizer, module", PACKAGES.items())
def test_an_optimizer_that_is_missing_names_its_package(optimizer, module, tmp_path, monkeypatch):
    for name in (module, f"{module}.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ValueError, match=f"Optimiser is not installed: got '{optimizer}', expected the package .*adamw"
    ):
        trainer(tmp_path, tiny_settings(optimizer=optimizer))


def test_8_bits_without_kernels_are_told_before_the_first_step(tmp_path, monkeypatch):
    optim = pytest.importorskip("bitsandbytes.optim")

    def step(self):
        raise NotImplementedError("no kernel for 'CPU'\nbackends: CUDA")

    monkeypatch.setattr(optim.AdamW8bit, "step", step)
    with pytest.raises(ValueError, match="8-bit Adam does not work here: got no kernel for 'CPU' from .* 'cpu'"):
        trainer(tmp_path, tiny_settings(optimizer="adamw8bit"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_trains_weights_in_fp32_and_continues_bit_by_bit(kind, dtype, tmp_path):
    settings = tiny_settings(kind=kind, dtype=dtype, steps=4)
    whole = trained(tmp_path / "whole", settings)
    assert all(weight.dtype == torch.float32 for weight in whole.values())
    trainer(tmp_path / "cut", settings, StopAfter(3)).run()
    assert_same(trained(tmp_path / "cut", settings), whole)
    exact = trained(tmp_path / "exact", tiny_settings(kind=kind, steps=4))
    first, expected = losses(tmp_path / "whole")[1], losses(tmp_path / "exact")[1]
    assert first == pytest.approx(expected, rel=0.05) and exact.keys() == whole.keys()


@pytest.mark.slow
def test_gradients_beyond_fp16_skip_steps_until_the_loss_scale_fits_and_it_is_kept(tmp_path):
    settings = tiny_settings(kind="full", dtype="fp16", steps=14)

    def begin(folder, **more):
        made = trainer(folder, settings, **more)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
        before = {name: parameter.detach().clone() for name, parameter in made.parameters.items()}
        made.run()
        return made, before

    cut, before = begin(tmp_path / "cut", events=StopAfter(2))
    assert_same(dict(cut.parameters), before)  # both steps overflowed
    assert cut.checkpoints.load()["scaler"]["scale"] == 2.0**24
    whole, _ = begin(tmp_path / "whole")
    state = whole.checkpoints.load()["scaler"]
    assert 2.0**10 < state["scale"] < 2.0**24 and state["_growth_tracker"] > 2
    assert not torch.equal(whole.parameters["model.t_block.1.weight"], before["model.t_block.1.weight"])
    assert_same(trained(tmp_path / "cut", settings), whole.trained_weights())


@pytest.mark.slow
def test_gradients_that_no_loss_scale_fits_stop_the_training(tmp_path):
    made = trainer(tmp_path, tiny_settings(kind="full", dtype="fp16", steps=50))
    made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**80)
    before = {name: parameter.detach().clone() for name, parameter in made.parameters.items()}
    with pytest.raises(TrainingDiverged, match="Loss is not a number: .* set dtype to bf16 or fp32"):
        made.run()
    assert made.step == 20
    assert_same(dict(made.parameters), before)


def test_a_crash_keeps_all_whole_steps(tmp_path):
    class Crash(Events):
        def stepped(self, progress):
            if progress.step == 4:
                raise KeyboardInterrupt

    settings = tiny_settings()
    whole = trained(tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", settings, Crash()).run()
    continued = trainer(tmp_path / "cut", settings)
    continued.run()
    assert len(continued.report.losses) == 6
    assert_same(continued.trained_weights(), whole)


def test_a_killed_process_loses_the_steps_since_the_checkpoint_alone(tmp_path, monkeypatch):
    settings = tiny_settings(checkpoint_every=2)
    whole = trained(tmp_path / "whole", settings)
    monkeypatch.setattr(Trainer, "_save_what_is_whole", lambda self: None)  # a killed process saves nothing

    class Kill(Events):
        def stepped(self, progress):
            if progress.step == 5:
                raise SystemExit

    with pytest.raises(SystemExit):
        trainer(tmp_path / "cut", settings, Kill()).run()
    continued = trainer(tmp_path / "cut", settings)
    assert [path.name for path in continued.checkpoints.all()] == ["step-00000002.pt", "step-00000004.pt"]
    continued.run()
    assert_same(continued.trained_weights(), whole)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_without_resume_it_begins_anew_and_takes_the_place_of_the_one_before(tmp_path):
    trained(tmp_path, tiny_settings(steps=3))
    made = trainer(tmp_path, tiny_settings(steps=2, seed=1))
    assert made.run(resume=False) == 2 and sorted(losses(tmp_path)) == [1, 2]
    assert [path.name for path in made.checkpoints.all()] == ["step-00000002.pt"]


@pytest.mark.slow
def test_a_broken_checkpoint_is_passed_over(tmp_path):
    settings = tiny_settings(checkpoint_every=2)
    whole = trained(tmp_path, settings)
    newest = tmp_path / "checkpoints" / "step-00000006.pt"
    content = newest.read_bytes()
    for broken in (content[:1000], b"", bytes(3000), b"\xff" * 100, b"a" * 50, b"not a checkpoint"):
        newest.write_bytes(broken)
        assert_same(trained(tmp_path, settings), whole)


@pytest.mark.slow
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed_and_told(tmp_path):
    """Or it is where nothing is read. torch.load itself reads most of such files, and gives other numbers."""
    checkpoints, noticed = Checkpoints(tmp_path, 2), 0
    states = {step: {"step": step, "parameters": {"a": torch.randn(9, 5)}, "sanity": {"mean": 0.5}} for step in (2, 4)}
    for step, state in states.items():
        rest = {"seconds": 1.0, "settings": {}, "sampler": {}, "extra": {}, "optimizer": {"b": torch.randn(40)}}
        states[step] = {**rest, **state}
        newest = checkpoints.save(step, states[step])
    content = newest.read_bytes()
    for place in range(0, len(content), 13):
        newest.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        checkpoints = Checkpoints(tmp_path, 2)
        state = checkpoints.load()
        assert repr(state) == repr(states[state["step"]]), place
        told = [f"damaged, passed over: {newest.name}; the training goes on after step 2"]
        assert checkpoints.notes == (told if state["step"] == 2 else [])
        noticed += state["step"] == 2
    assert noticed > 20


def test_a_training_whose_checkpoints_are_all_damaged_begins_anew_and_says_so(tmp_path):
    trained(tmp_path, tiny_settings(steps=1))
    (tmp_path / "checkpoints" / "step-00000001.pt").write_bytes(b"none")
    made = trainer(tmp_path, tiny_settings(steps=2))
    made.run()
    assert made.notes == ["damaged, passed over: step-00000001.pt; the training begins again"]


def test_the_last_checkpoints_are_kept(tmp_path):
    made = trainer(tmp_path, tiny_settings(checkpoint_every=1, keep_last=3))
    made.run()
    assert [path.name for path in made.checkpoints.all()] == [f"step-0000000{step}.pt" for step in (4, 5, 6)]
    assert not [path for path in made.checkpoints.folder.iterdir() if path.suffix != ".pt"]


def test_more_steps_continue_a_finished_run(tmp_path):
    trained(tmp_path, tiny_settings(steps=3))
    made = trainer(tmp_path, tiny_settings(steps=5))
    assert made.run() == 5
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "change, match",
    [({"rank": 3}, "other settings: got rank 3 instead of 2"), ({"batch_size": 3}, "continued with other data")],
)
def test_another_training_is_not_continued(change, match, tmp_path):
    trained(tmp_path, tiny_settings(steps=2))
    with pytest.raises(ValueError, match=match):
        trained(tmp_path, tiny_settings(steps=4, **change))


def test_another_model_is_not_continued(tmp_path):
    settings = tiny_settings(steps=2)
    trained(tmp_path, settings)
    other = make_objective(tiny_model(depth=2), settings)
    with pytest.raises(ValueError, match="other trained weights"):
        Trainer(other, make_features(), settings, tmp_path).run()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_name_does_not_continue_a_training_of_other_pictures_or_another_base(kind, tmp_path):
    """Of the same number, sizes and shapes; a base of the same numbers in another dtype is the same."""
    settings, more = tiny_settings(kind=kind, steps=2), tiny_settings(kind=kind, steps=3)
    features = make_features()
    train(tiny_model(), features, settings, tmp_path)
    with pytest.raises(ValueError, match="continued with other data: got other pictures.* first 2 steps"):
        train(tiny_model(), make_features(seed=1), more, tmp_path)
    other = tiny_model()
    with torch.no_grad():
        other.blocks[0].attn.qkv.weight[3:40] *= 1.01
    with pytest.raises(ValueError, match="another base model: got other numbers in blocks.0.attn.qkv.weight"):
        train(other, features, more, tmp_path)
    with pytest.raises(ValueError, match="another base model: got pe_scale 0.5 instead of"):
        train(tiny_model(pe_scale=0.5), features, more, tmp_path)
    assert train(tiny_model().to(torch.bfloat16), features, more, tmp_path).step == 3


def test_a_checkpoint_of_an_earlier_version_goes_on_bit_by_bit(tmp_path):
    """Which says nothing of its data and its base."""
    whole = trained(tmp_path / "whole", tiny_settings(steps=5), features=make_features())
    features = make_features()
    train(tiny_model(), features, tiny_settings(steps=3), tmp_path / "cut")
    path = tmp_path / "cut" / "checkpoints" / "step-00000003.pt"
    state = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in state.items() if name not in ("data", "base")}, path)
    assert_same(train(tiny_model(), features, tiny_settings(steps=5), tmp_path / "cut").weights, whole)


@pytest.mark.parametrize("clip_norm", [0.0, 0.01])
def test_a_step_follows_the_mean_of_its_forward_passes_cut_to_the_largest_norm(clip_norm, tmp_path, monkeypatch):
    settings = tiny_settings(kind="full", accumulation=3, steps=1, clip_norm=clip_norm)
    made, found = trainer(tmp_path, settings), {}
    with monkeypatch.context() as patched:
        patched.setattr(made.scaler, "step", lambda optimizer: found.update(gradients(made.parameters)))
        made.run()
    other = trainer(tmp_path / "other", settings)
    for number in range(3):
        (other.objective(*other._load(number)).total / 3).backward()
    expected = gradients(other.parameters)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    assert made.norm == pytest.approx(norm, rel=1e-5) and norm > 0.1
    share = clip_norm / norm if clip_norm else 1.0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient * share, rtol=1e-4, atol=1e-7)


def gradients(parameters):
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


def test_the_result_is_the_average_of_the_weights_over_the_steps(tmp_path):
    made = trainer(tmp_path, tiny_settings(ema_decay=0.3, steps=4))
    average = {name: parameter.detach().clone() for name, parameter in made.parameters.items()}

    class Follow(Events):
        def stepped(self, progress):
            decay = min(0.3, (1 + progress.step) / (10 + progress.step))
            for name, parameter in made.parameters.items():
                average[name] = decay * average[name] + (1 - decay) * parameter.detach()

    made.events = Follow()
    made.run()
    for name, weight in made.trained_weights().items():
        torch.testing.assert_close(weight, average[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(weight, made.parameters[name])
    assert_same(made.checkpoints.load()["parameters"], made.parameters)


def test_two_halves_of_a_batch_are_the_batch(tmp_path):
    settings = tiny_settings(batch_size=4)
    made = trainer(tmp_path, settings, features=make_features(count=4, sizes=((8, 8),)))
    batch, draws = made._load(0)
    halves = []
    for rank in (0, 1):
        half = trainer(tmp_path, tiny_settings(batch_size=2), features=made.features)
        half.sampler = type(half.sampler)(made.features.bins, 2, world_size=2, rank=rank)
        half.processes.rank, half.processes.world_size = rank, 2
        halves.append(half._load(0))
    for whole, name in ((batch, "latent"), (draws, "noise"), (draws, "timestep"), (draws, "dropped")):
        parts = torch.cat([getattr(half[whole is draws], name) for half in halves])
        assert torch.equal(parts, getattr(whole, name)), name


def test_not_a_number_stops_before_the_weights_are_harmed(tmp_path):
    features = make_features()
    made = trainer(tmp_path, tiny_settings(steps=50), features=features)
    good = trained(tmp_path / "good", tiny_settings(steps=2), features=features)

    class Poison(Events):
        def stepped(self, progress):
            if progress.step == 2:
                made.prepared = lambda batch, draws: made.objective(batch, draws)._replace(
                    total=sum(p.sum() for p in made.parameters.values()) * float("nan")
                )

    made.events = Poison()
    with pytest.raises(TrainingDiverged, match=r"Loss is not a number: got loss nan .* Lower the learning rate"):
        made.run()
    assert_same(made.trained_weights(), good)
    assert_same(made.checkpoints.load()["parameters"], good)


@pytest.mark.slow
def test_an_exploding_loss_stops_and_the_last_good_state_goes_on(tmp_path):
    fields = {"kind": "full", "clip_norm": 0, "checkpoint_every": 5, "keep_last": 1}
    whole = trained(tmp_path / "whole", tiny_settings(**fields, steps=22))
    trained(tmp_path / "cut", tiny_settings(**fields, steps=20))
    made = trainer(tmp_path / "cut", tiny_settings(**fields, steps=300, learning_rate=0.1))
    with pytest.raises(TrainingDiverged, match="Loss exploded: .* expected at most 4. Lower the learning rate") as told:
        made.run()
    (good,) = made.checkpoints.all()
    assert made.step > 25 and good.name == "step-00000020.pt"
    assert str(told.value).endswith(f"the last good one is {good.name} in '{good.parent}'.")
    assert_same(trained(tmp_path / "cut", tiny_settings(**fields, steps=22)), whole)


def test_a_loss_that_explodes_from_the_beginning_leaves_no_bad_state(tmp_path):
    settings = tiny_settings(kind="full", learning_rate=0.1, steps=300, checkpoint_every=2, clip_norm=0)
    made = trainer(tmp_path, settings)
    with pytest.raises(TrainingDiverged, match="Loss exploded: .* none is kept yet"):
        made.run()
    assert made.step == 19 and not made.checkpoints.all()


def test_an_error_without_scale_explodes_by_its_rise():
    sanity = Sanity(None)
    assert all(sanity.follow(error) for error in [1000.0] * 10 + [1.0, 30.0] * 40)
    assert not all(sanity.follow(1e6) for _ in range(10))


def test_noisy_errors_are_no_explosion():
    sanity = Sanity(4.0)
    assert all(sanity.follow(error) for error in [0.001, 0.9, 0.02, 3.0, 0.3] * 50)


def test_a_full_disk_gives_older_checkpoints_up_and_then_stops(tmp_path, monkeypatch):
    made = trainer(tmp_path, tiny_settings(checkpoint_every=1, keep_last=3))
    full_from = 5
    write = state_module.write_atomically

    def limited(path, fill):
        if path.name >= f"step-{full_from:08d}.pt" and len(made.checkpoints.all()) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, fill)

    monkeypatch.setattr(state_module, "write_atomically", limited)
    made.run()
    assert [path.name for path in made.checkpoints.all()] == ["step-00000005.pt", "step-00000006.pt"]


def test_a_disk_that_stays_full_stops_the_training_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    made = trainer(tmp_path, tiny_settings(checkpoint_every=1))
    write = state_module.write_atomically

    def limited(path, fill):
        if path.name > "step-00000003.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, fill)

    monkeypatch.setattr(state_module, "write_atomically", limited)
    with pytest.raises(OSError, match="Checkpoint cannot be written: .*No space left.*step-00000003.pt"):
        made.run()
    assert made.checkpoints.load()["step"] == 3


def test_a_file_system_that_takes_no_more(tmp_path):
    """A limit of the kernel in place of a full disk: what torch itself raises in the middle of a file."""
    resource = pytest.importorskip("resource")
    made = trainer(tmp_path, tiny_settings(kind="full", checkpoint_every=2))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limit[1]))
    try:
        with pytest.raises(OSError, match="Checkpoint cannot be written: .* MB are needed in .* start again"):
            made.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert made.step == 2 and not list(made.checkpoints.folder.iterdir())
    assert made.run() == 6  # with space again it goes on


def test_one_picture_fills_a_batch(tmp_path):
    features = make_features(count=1)
    made = trainer(tmp_path, tiny_settings(batch_size=4), features=features)
    assert made.run() == 6
    batch, draws = trainer(tmp_path / "look", tiny_settings(batch_size=4), features=features)._load(0)
    assert len(batch) == 4 and torch.equal(batch.latent[0], batch.latent[3])
    assert not torch.equal(draws.noise[0], draws.noise[3])


@pytest.mark.parametrize("part", ["latent", "deviation", "caption", "hint"])
def test_damaged_features_name_their_picture(part, tmp_path):
    features = make_features(hint=True)
    example = features.examples[3]
    features.examples[3] = replace(example, **{part: getattr(example, part) * float("nan")}, text="a cat")
    made = trainer(tmp_path, tiny_settings(steps=20), features=features)
    with pytest.raises(ValueError, match=f"got NaN or infinity in the {part} of 'picture 4' .'a cat'., .* Encode it"):
        made.run()


def test_pictures_of_another_size_than_the_models_are_told(tmp_path):
    model = tiny_model(base_size=4)  # 64 px
    assert not train(model, make_features(), tiny_settings(steps=1), tmp_path / "own").notes
    large = make_features(count=3, sizes=((16, 16), (8, 8), (16, 16)))
    notes = train(tiny_model(base_size=4), large, tiny_settings(steps=1), tmp_path / "large").notes
    assert notes == ("2 of 3 pictures are of another size than the model's: about 128 px, and it was trained at 64",)


def test_too_small_a_disk_is_refused_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(state_module, "free_bytes", lambda place: 9)
    made = trainer(tmp_path, tiny_settings())
    with pytest.raises(OSError, match="Disk is too full for the checkpoints: .* MB are missing"):
        made.run()
    assert made.step == 0


def test_progress_tells_the_time_left(tmp_path):
    events = StopAfter(100)
    trainer(tmp_path, tiny_settings(), events).run()
    assert [each.step for each in events.seen] == [1, 2, 3, 4, 5, 6]
    assert events.seen[-1].seconds_left == 0 and events.seen[0].seconds_left > 0
    entry = json.loads((tmp_path / LOG).read_text().splitlines()[-1])
    assert entry["loss"] == events.seen[-1].loss and entry["smoothed"] == events.seen[-1].smoothed


def test_dropout_leaves_the_surroundings_random_state_alone(tmp_path):
    made = trainer(tmp_path, tiny_settings(dropout=0.5, steps=2))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    made.run()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks_give_the_same_weights(kind, tmp_path):
    weights = []
    for again in CHECKPOINTING:
        settings = tiny_settings(kind=kind, checkpointing=again, dropout=0.2)
        weights.append(trained(tmp_path / again, settings))
    assert_same(*weights[:2])
    assert_same(weights[0], weights[2])
