"""What a training tells: log, curve, TensorBoard, Weights & Biases, validation pictures."""

import errno
import json
import subprocess
import sys
import time

import pytest
import torch

import pixart_pack.pixart.training.run as run_module
from pixart_pack.pixart.drawing.curves import draw_curve
from pixart_pack.pixart.training.build import make_objective
from pixart_pack.pixart.training.loop import Events, Trainer
from pixart_pack.pixart.training.report import LOG, Course, Report, read_log
from pixart_pack.pixart.training.run import RESULT, choose_folder, train
from pixart_pack.pixart.training.validation import ValidationPrompt, read_prompts, write_prompts
from pixart_pack.tests.training_data import make_features, tiny_model, tiny_settings


def decode(latent):
    return torch.nn.functional.interpolate(latent[:, :3], scale_factor=8).movedim(1, -1).sigmoid()


def prompts_of(features):
    return [ValidationPrompt(features[i].caption, features.bins[i], features[i].hint, f"é {i}") for i in range(2)]


def test_a_log_that_was_cut_is_read_up_to_there(tmp_path):
    path = tmp_path / LOG
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(path) == [{"step": 1, "loss": 2.0}]
    report = Report(tmp_path, tiny_settings())
    report.start(1)
    assert report.log(2, 4.0, 4.0, 1.0, 1e-3, 0.1) == pytest.approx(3.0)
    report.close()
    assert [entry["step"] for entry in read_log(path)] == [1, 2]


def test_a_continued_log_is_not_read_again(tmp_path):
    """A log of a million steps takes seconds to read: what is before the checkpoint is left as it is."""
    before = Report(tmp_path, tiny_settings())
    before.start(0)
    for step in range(1, 4):
        before.log(step, float(step), 1.0, 1.0, 1e-3, 0.1)
    state = before.state()
    before.log(4, 9.0, 1.0, 1.0, 1e-3, 0.1)
    before.close()
    path = tmp_path / LOG
    unread = path.read_bytes().replace(b'"step"', b'"ste\xff"', 3)
    path.write_bytes(unread)
    after = Report(tmp_path, tiny_settings())
    after.start(3, state)
    assert path.read_bytes() == unread[: state["log_bytes"]] and not after.notes
    assert after.smoothed == state["smoothed"] and after.losses.points() == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert after.log(4, 5.0, 1.0, 1.0, 1e-3, 0.1) == pytest.approx(2.75)
    after.close()
    assert [entry["loss"] for entry in read_log(path)] == [1.0, 2.0, 3.0, 5.0]


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: b"{}" + data])
def test_a_log_that_is_not_as_it_was_is_read(tmp_path, damage):
    before = Report(tmp_path, tiny_settings())
    before.start(0)
    for step in range(1, 4):
        before.log(step, float(step), 1.0, 1.0, 1e-3, 0.1)
    state = before.state()
    before.close()
    (tmp_path / LOG).write_bytes(damage((tmp_path / LOG).read_bytes()))
    after = Report(tmp_path, tiny_settings())
    after.start(3, state)
    after.close()
    assert len(after.losses) == len(read_log(tmp_path / LOG)) < 3


def test_the_course_of_a_long_training_has_few_points_and_goes_on_from_its_state():
    course = Course()
    for step in range(1, 20_001):
        course.add(step, step / 2)
        if step == 17_003:
            again = Course(course.state())
        elif step > 17_003:
            again.add(step, step / 2)
    points = course.points()
    assert again.points() == points and len(course) == len(again) == 20_000 and len(points) < 8192
    assert all(loss == step / 2 for step, loss in points) and points[0][0] < 4 and points[-1][0] > 19_996


@pytest.mark.parametrize("losses", [[], [(1, 0.5)], [(step, 1 / step) for step in range(1, 3000)], [(1, float("nan"))]])
def test_the_curve_of_any_number_of_losses(losses):
    curve = draw_curve(losses, (320, 160))
    assert curve.size == (320, 160)
    blue = [count for count, colour in curve.getcolors(1 << 16) if colour == (31, 97, 172)]
    assert bool(blue) == bool([loss for _, loss in losses if loss == loss])


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    features = make_features()
    settings = tiny_settings(tensorboard=True, sample_every=3, sample_steps=2, steps=3)
    train(tiny_model(), features, settings, tmp_path, prompts=prompts_of(features), decode=decode)
    events = reading.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "smoothed", "learning_rate", "gradient_norm"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert events.Tags()["images"] == ["validation"] and events.Tags()["tensors"] == ["settings/text_summary"]


@pytest.mark.slow
def test_wandb_works_offline_and_goes_on_with_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    features = make_features()
    for steps in (2, 3):
        settings = tiny_settings(wandb=True, steps=steps, sample_every=2, sample_steps=2)
        train(tiny_model(), features, settings, tmp_path / "run", prompts=prompts_of(features), decode=decode)
        time.sleep(1.1)  # wandb names its folders by the second
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len({path.name.rpartition("-")[2] for path in runs}) == 1
    assert [len(list((path / "files" / "media" / "images").glob("validation_*.png"))) for path in runs] == [2, 1]
    (log,) = runs[0].glob("*.wandb")
    assert all(name in log.read_bytes() for name in (b"gradient_norm", b"learning_rate", b"caption_dropout"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "controlnet", "lcm"])
def test_validation_pictures_are_the_same_for_the_same_weights(kind, tmp_path):
    features = make_features(hint=True)
    settings = tiny_settings(kind=kind, steps=2, sample_every=1, sample_steps=2, ema_decay=0.9)
    shown = []
    for name in ("one", "two"):
        result = train(
            tiny_model(), features, settings, tmp_path / name, prompts=prompts_of(features), decode=decode,
            show=shown.append,
        )  # fmt: skip
    assert len(shown) == 6 and [a.tobytes() for a in shown[:3]] == [b.tobytes() for b in shown[3:]]
    assert shown[0].tobytes() != shown[2].tobytes()
    heading = 2 * 16  # a line for each prompt
    assert result.strip.size == (64 + 80, heading + 3 * (64 + 16)) and shown[0].size == (144, 64)
    assert result.strip.crop((0, 0, 144, heading)).getextrema() != ((255, 255),) * 3
    assert (tmp_path / "one" / "samples.png").is_file()


@pytest.mark.slow
def test_validation_does_not_change_the_training(tmp_path):
    features, weights = make_features(), []
    for name, every in (("with", 1), ("without", 0)):
        settings = tiny_settings(sample_every=every, sample_steps=2, dropout=0.3, ema_decay=0.5)
        result = train(tiny_model(), features, settings, tmp_path / name, prompts=prompts_of(features), decode=decode)
        weights.append(result.weights)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_greatest_seed_is_enough_for_several_prompts(tmp_path):
    features, shown = make_features(), []
    settings = tiny_settings(steps=1, sample_every=1, sample_steps=2, sample_seed=2**64 - 1)
    train(tiny_model(), features, settings, tmp_path, prompts=prompts_of(features), decode=decode, show=shown.append)
    assert len(shown) == 2


def test_prompts_come_back_from_their_file(tmp_path):
    prompts = prompts_of(make_features(hint=True))
    write_prompts(tmp_path / "p.safetensors", prompts)
    for found, expected in zip(read_prompts(tmp_path / "p.safetensors"), prompts, strict=True):
        assert torch.equal(found.caption, expected.caption) and torch.equal(found.hint, expected.hint)
        assert (found.size_latent, found.text) == (expected.size_latent, expected.text)


def test_a_result_that_found_no_room_is_written_by_the_next_run(tmp_path, monkeypatch):
    settings = tiny_settings(steps=2)
    folder = choose_folder(tmp_path, "full", True, 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "save_result", full)
        with pytest.raises(OSError, match="Result cannot be written: got No space left"):
            train(tiny_model(), make_features(), settings, folder)
    assert choose_folder(tmp_path, "full", True, 2) == folder
    result = train(tiny_model(), make_features(), settings, folder)
    assert result.step == 2 and result.file.is_file()
    assert json.loads((folder / RESULT).read_text())["step"] == 2


def test_a_run_that_another_process_trains_is_refused_and_a_dead_ones_goes_on(tmp_path):
    """By locks of the system, which fall with their process: nothing has to be cleared away by hand."""
    folder, features, refused = tmp_path / "one_001", make_features(), []
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder / ".lock"], stdout=subprocess.PIPE)
    assert holder.stdout.readline()
    with pytest.raises(ValueError, match="Training is running already: got 'one_001', into which another process"):
        train(tiny_model(), features, tiny_settings(steps=2), folder)
    holder.kill()
    holder.wait()
    holder.stdout.close()

    class Second(Events):
        def stepped(self, progress):
            with pytest.raises(ValueError, match="Training is running already"):
                train(tiny_model(), features, tiny_settings(steps=2), folder)
            refused.append(progress.step)

    assert train(tiny_model(), features, tiny_settings(steps=2), folder, events=Second()).step == 2
    assert refused == [1, 2]


HOLD = """
import sys
from pathlib import Path
path = Path(sys.argv[1])
path.parent.mkdir(parents=True)
file = open(path, "a+b")
if sys.platform == "win32":
    import msvcrt
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl
    fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
import time
time.sleep(600)
"""


def test_what_a_killed_process_left_half_written_is_swept_and_nothing_else(tmp_path):
    folder, file = tmp_path / "runs" / "one_001", tmp_path / "loras" / "one_001.safetensors"
    left = [
        folder / ".log.jsonl.0123abcd.tmp",
        folder / "checkpoints" / ".step-00000250.pt.0123abcd.tmp",
        folder / "samples" / ".step-00000000.png.00000000.tmp",
        file.with_name(f".{file.name}.89abcdef.tmp"),
    ]
    others = [
        file.with_name(".two_001.safetensors.89abcdef.tmp"),  # which its own process may be writing
        folder / ".mine.tmp",
        folder / "checkpoints" / "notes.tmp",
    ]
    for path in (*left, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
    train(tiny_model(), make_features(), tiny_settings(steps=1), folder, file=file)
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_a_result_whose_place_takes_none_is_written_elsewhere_and_says_so(tmp_path):
    (tmp_path / "loras").write_text("a file where a folder should be")
    folder = tmp_path / "one_001"
    result = train(
        tiny_model(base_size=4),
        make_features(),
        tiny_settings(steps=1),
        folder,
        file=tmp_path / "loras" / "a.safetensors",
    )
    assert result.file == folder / "a.safetensors" and result.file.is_file()
    assert len(result.notes) == 1 and result.notes[0].endswith(f"but here: {result.file}")
    assert "MB are needed in" in result.notes[0]
    assert json.loads((folder / RESULT).read_text())["file"] == str(result.file)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_no_training_and_says_what_is_missing(tmp_path):
    """A limit of the kernel on files in place of a full disk: for logs, pictures and the last checkpoint."""
    resource = pytest.importorskip("resource")
    settings = tiny_settings(steps=30, sample_every=15, sample_steps=1, checkpoint_every=0, tensorboard=True)
    features, shown = make_features(), []
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limit[1]))
    try:
        with pytest.raises(OSError, match="Result cannot be written: got File too large: .* MB are needed in") as told:
            train(tiny_model(), features, settings, tmp_path / "full_001", prompts=prompts_of(features), decode=decode,
                  show=shown.append)  # fmt: skip
        assert str(told.value).count("MB are needed in") == 2 and len(shown) == 3
        made = Trainer(make_objective(tiny_model(), settings), features, settings, tmp_path / "notes")
        assert made.run() == 30 and len(made.report.losses) == 30
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    told = "\n".join(made.notes)
    assert "Checkpoint cannot be written" in told
    assert "entries of log.jsonl are lost" in told and "entries of TensorBoard are lost" in told


def test_a_line_of_another_program_does_not_stop_a_training_from_going_on(tmp_path):
    settings = tiny_settings(steps=2)
    train(tiny_model(), make_features(), settings, tmp_path)
    with (tmp_path / LOG).open("a", encoding="utf-8") as file:
        file.write('{"event": "epoch"}\n[1, 2]\n7\nnull\n{"step": "two", "loss": 1}\n{"step": 1, "loss": null}\n')
    result = train(tiny_model(), make_features(), tiny_settings(steps=3), tmp_path)
    assert result.step == 3 and [entry["step"] for entry in read_log(tmp_path / LOG)] == [1, 2, 3]
