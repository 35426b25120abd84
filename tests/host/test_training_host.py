"""The training nodes in this process: what they leave alone, and what they give."""

import importlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import pixart_pack.pixart.commands.train as train_command
from pixart_pack.pixart.data.cache import DatasetEncoder, EncodeSettings
from pixart_pack.pixart.data.pictures import TensorPicture
from pixart_pack.pixart.data.records import Record
from pixart_pack.pixart.lora import merge, read_lora
from pixart_pack.pixart.training.settings import read_config
from pixart_pack.tests.stages.tiny_dit import make_dit
from pixart_pack.tests.tiny_pixart import make_weights, tiny_config
from pixart_pack.tests.training_data import make_features

CONFIG = tiny_config()
USUAL = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "seed": 1}


@pytest.fixture(scope="module")
def output(comfy):
    return Path(importlib.import_module("folder_paths").get_output_directory())


@pytest.fixture(scope="module")
def management(comfy):
    return importlib.import_module("comfy.model_management")


@pytest.fixture
def make_model(pack):
    module = importlib.import_module("pixart_pack.nodes.host.denoiser.model")

    def make(dtype=torch.float32, config=CONFIG):
        with torch.inference_mode():
            return module.make_patcher(make_weights(config), config, dtype)

    return make


@pytest.fixture
def features():
    with torch.inference_mode():  # as encoded inside a prompt
        return make_features(count=6, hint=True)


def weights_of(model):
    """The weights that a MODEL runs with, by their names in the host."""
    with torch.inference_mode():
        model.patch_model()
        found = {name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()}
        model.unpatch_model()
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_lora_is_trained_applied_and_saved(run_node, make_model, features, output):
    model = make_model()
    before = weights_of(model)
    trained, file, curve, samples = run_node("PixArtTrainLoRA", model=model, features=features, name="one", rank=2,
                                             targets="attention", **USUAL)  # fmt: skip
    assert same(weights_of(model), before) and not model.patches
    assert (output.parent / file).parent == output / "loras" and curve.shape[0] == samples.shape[0] == 1
    merged = merge(make_weights(CONFIG), read_lora(output.parent / file))
    after = weights_of(trained)
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert len(changed) == 3 * 5
    for name in changed:
        # The host rounds a sum to its weights' dtype once, as the merge does.
        torch.testing.assert_close(after[name], merged[name], rtol=1e-5, atol=1e-6)
    with safe_open(output.parent / file, framework="pt") as opened:
        assert '"rank": 2' in opened.metadata()["pixart_training"]
    run = output / "pixart_training" / "one_001"
    assert {"checkpoints", "log.jsonl", "loss.png"} <= {path.name for path in run.iterdir()}


@pytest.mark.parametrize("adapter", ["loha", "lokr", "oft"])
def test_other_adapters_are_trained_validated_and_put_onto_the_model(run_node, make_model, features, output, adapter):
    model, name = make_model(), f"other_{adapter}"
    more = f"adapter: {adapter}\nvalidation_share: 0.2\nvalidation_every: 1\nbase_dtype: nf4"
    trained, file, *_ = run_node("PixArtTrainLoRA", model=model, features=features, name=name, rank=2,
                                 targets="attention", more_settings=more, **USUAL)  # fmt: skip
    merged, after = merge(make_weights(CONFIG), read_lora(output.parent / file)), weights_of(trained)
    changed = [key for key, value in weights_of(model).items() if not torch.equal(after[key], value)]
    assert changed
    for key in changed:
        torch.testing.assert_close(after[key], merged[key], rtol=1e-5, atol=1e-6)  # as the host rounds a sum
    log = (output / "pixart_training" / f"{name}_001" / "log.jsonl").read_text().splitlines()
    assert all('"validation_loss"' in line for line in log) and (output.parent / file).is_file()


def test_loras_on_the_model_are_part_of_what_is_trained_on(run_node, make_model, features, output):
    _, file, *_ = run_node("PixArtTrainLoRA", model=make_model(), features=features, name="base_lora", rank=2,
                           targets="attention", **{**USUAL, "steps": 5})  # fmt: skip
    module = importlib.import_module("pixart_pack.nodes.host.lora")
    settings = importlib.import_module("pixart_pack.pixart.training.settings").TrainingSettings()
    training = importlib.import_module("pixart_pack.nodes.host.training.runs")
    patched = module.add_lora(make_model(), read_lora(output.parent / file).factors, 0.5)
    with torch.inference_mode(False):
        plain = training.plain_model(patched, settings, torch.device("cpu"))
    expected = merge(make_weights(CONFIG), read_lora(output.parent / file), 0.5)
    assert all(not parameter.is_inference() for parameter in plain.parameters())
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_merged_and_patched_models_are_trained_on(run_node, core_nodes, make_model, features, output):
    """A merge of two models with a LoRA on it is what is frozen, and what the new LoRA goes onto."""
    model_of = importlib.import_module("pixart_pack.nodes.host.denoiser.model").make_patcher
    weights = [make_weights(CONFIG, seed) for seed in (0, 1)]
    with torch.inference_mode():
        models = [model_of(dict(each), CONFIG, torch.float32) for each in weights]
        blend = core_nodes["ModelMergeSimple"]().merge(*models, ratio=0.25)[0]
    usual = {"features": features, "rank": 2, "targets": "attention", **USUAL}
    patched, first, *_ = run_node("PixArtTrainLoRA", model=blend, name="on_merge", **usual)
    trained, second, *_ = run_node("PixArtTrainLoRA", model=patched, name="on_patches", **{**usual, "seed": 2})
    expected = {name: 0.25 * weights[0][name] + 0.75 * weights[1][name] for name in weights[0]}
    settings = importlib.import_module("pixart_pack.pixart.training.settings").TrainingSettings()
    training = importlib.import_module("pixart_pack.nodes.host.training.runs")
    for model, lora in ((blend, None), (patched, first)):
        expected = merge(expected, read_lora(output.parent / lora)) if lora else expected
        with torch.inference_mode(False):
            plain = training.plain_model(model, settings, torch.device("cpu"))
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    expected, after = merge(expected, read_lora(output.parent / second)), weights_of(trained)
    for name in make_weights(CONFIG):
        if name in after:
            torch.testing.assert_close(after[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_lora_of_every_layer_loads_in_the_hosts_own_loader(run_node, core_nodes, make_model, features, output):
    """The patch embedding's convolution among them."""
    model, usual = make_model(), {"features": features, "rank": 2, "targets": "custom", **USUAL}
    trained, file, *_ = run_node("PixArtTrainLoRA", model=model, name="every", more_settings="target_pattern: .*",
                                 **usual)  # fmt: skip
    loras = Path(importlib.import_module("folder_paths").get_folder_paths("loras")[0])
    loras.mkdir(parents=True, exist_ok=True)
    shutil.copy(output.parent / file, loras)
    with torch.inference_mode():
        loaded = core_nodes["LoraLoaderModelOnly"]().load_lora_model_only(model, (output.parent / file).name, 1.0)[0]
    before, after, hosts = (weights_of(each) for each in (model, trained, loaded))
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert len(changed) == 3 * 7 + 11 and "x_embedder.proj.weight" in changed
    for name in before:
        torch.testing.assert_close(hosts[name], after[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["fine-tune", "DreamBooth"])
def test_a_whole_model_is_trained(run_node, make_model, features, output, method):
    model = make_model()
    before = weights_of(model)
    trained, file, *_ = run_node("PixArtTrain", model=model, features=features, name=method, method=method, **USUAL)
    assert same(weights_of(model), before) and (output.parent / file).parent == output / "diffusion_models"
    after = weights_of(trained)
    assert trained.model.pixart_config == CONFIG and trained.model.has_null_caption
    assert not torch.equal(after["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])
    assert torch.equal(after["y_embedder.y_embedding.weight"], before["y_embedder.y_embedding.weight"])


@pytest.mark.parametrize("method", ["LoRA", "model"])
def test_lcm_is_distilled(run_node, make_model, features, method):
    model = make_model()
    before = weights_of(model)
    trained, *_ = run_node("PixArtDistillLCM", model=model, features=features, name="lcm", method=method,
                           lcm_guidance=4.5, rank=2, targets="attention", **USUAL)  # fmt: skip
    assert same(weights_of(model), before) and not same(weights_of(trained), before)


@pytest.mark.parametrize("method", ["LoRA", "model"])
def test_dmd_is_distilled(run_node, make_model, features, output, method):
    model = make_model()
    before = weights_of(model)
    trained, file, *_ = run_node("PixArtDistillDMD", model=model, features=features, name="dmd", method=method,
                                 dmd_guidance=3.0, rank=2, targets="attention", **USUAL)  # fmt: skip
    assert same(weights_of(model), before) and not same(weights_of(trained), before)
    place = "loras" if method == "LoRA" else "diffusion_models"
    assert (output.parent / file).parent == output / place


def test_a_grown_model_is_trained_and_says_what_it_grew_from(run_node, make_model, features, output):
    model = make_model(config=tiny_config("alpha-512"))
    before = weights_of(model)
    grown, *_ = run_node("PixArtGrow", model=model, stage="sigma-1024-kvcompress", size_px=64)
    assert same(weights_of(model), before)
    assert grown.model.pixart_config.is_sigma and grown.model.pixart_config.base_px == 1024
    larger, *_ = run_node("PixArtGrow", model=grown, stage="size in pixels", size_px=2048)
    trained, file, *_ = run_node("PixArtTrain", model=larger, features=features, name="grown", method="fine-tune",
                                 **USUAL)  # fmt: skip
    info, *_ = run_node("PixArtModelInfo", model=trained)
    assert "stage: grown from alpha at 512 px to Sigma at 1024 px (sigma-1024-kvcompress)" in info
    assert "stage: grown from Sigma at 1024 px to Sigma at 2048 px (2048)" in info
    with pytest.raises(ValueError, match="Size out of range"):
        run_node("PixArtGrow", model=model, stage="size in pixels", size_px=72)


def test_a_pixart_starts_from_a_dit_in_a_graph(run_node, comfy, features, tmp_path):
    paths = importlib.import_module("folder_paths")
    folder = Path(paths.get_folder_paths("diffusion_models")[0])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(make_dit().state_dict(), folder / "tiny_dit.pt")
    try:
        model, *_ = run_node("PixArtStartFromDiT", dit="tiny_dit.pt", caption_width=CONFIG.caption_channels)
    finally:
        (folder / "tiny_dit.pt").unlink()
    assert model.model.pixart_config.base_size == 4
    trained, *_ = run_node("PixArtTrain", model=model, features=features, name="dit", method="fine-tune", **USUAL)
    info, *_ = run_node("PixArtModelInfo", model=trained)
    assert "stage: started from tiny_dit.pt" in info


def test_a_controlnet_is_trained(run_node, make_model, features, output):
    control, file, *_ = run_node("PixArtTrainControlNet", model=make_model(), features=features, name="edges", **USUAL)
    assert (
        control.control_model.num_copies == CONFIG.depth - 1 and (output.parent / file).parent == output / "controlnet"
    )
    with pytest.raises(ValueError, match="Control pictures are missing"):
        run_node("PixArtTrainControlNet", model=make_model(), features=make_features(), name="none", **USUAL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("base_fp8", [False, True])
def test_a_base_of_any_precision_is_trained_on(run_node, make_model, features, dtype, base_fp8):
    model = make_model(dtype)
    before = weights_of(model)
    trained, *_ = run_node("PixArtTrainLoRA", model=model, features=features, name="precision", rank=2,
                           targets="blocks", base_fp8=base_fp8, dtype="bf16", **USUAL)  # fmt: skip
    kept = weights_of(model)
    assert all(torch.equal(kept[name].float(), before[name].float()) for name in before)
    assert trained.patches


def test_an_interruption_saves_and_gives_what_is_there(run_node, make_model, features, management, monkeypatch, output):
    training = importlib.import_module("pixart_pack.nodes.host.training.runs")
    usual = {"model": make_model(), "features": features, "name": "cut", "rank": 2, "targets": "attention"}
    stepped = training.TrainingView.stepped

    def interrupt(self, progress):
        stepped(self, progress)
        if progress.step == 2:
            management.interrupt_current_processing(True)

    whole, *_ = run_node("PixArtTrainLoRA", **{**usual, **USUAL, "name": "whole", "steps": 5})
    with monkeypatch.context() as patched:
        patched.setattr(training.TrainingView, "stepped", interrupt)
        trained, file, *_ = run_node("PixArtTrainLoRA", **{**usual, **USUAL, "steps": 5})
    assert trained.patches and (output.parent / file).is_file() and not management.processing_interrupted()
    again, second, *_ = run_node("PixArtTrainLoRA", **{**usual, **USUAL, "steps": 5})
    assert second == file and same(weights_of(again), weights_of(whole))
    assert not same(weights_of(again), weights_of(trained))


def test_an_interruption_that_the_progress_bar_meets_ends_the_training_alone(
    run_node, make_model, features, management, monkeypatch, output
):
    """During a step, which is most of the time: the server's hook of the bar raises it, as `main.py` sets it up."""
    steps = []

    def hook(value, total, preview, node_id=None):
        steps.append(value)
        if value == 1:
            management.interrupt_current_processing(True)
        management.throw_exception_if_processing_interrupted()

    monkeypatch.setattr(importlib.import_module("comfy.utils"), "PROGRESS_BAR_HOOK", hook)
    trained, file, *_ = run_node("PixArtTrainLoRA", model=make_model(), features=features, name="met", rank=2,
                                 targets="attention", **{**USUAL, "steps": 50})  # fmt: skip
    assert (
        steps == [1]
        and trained.patches
        and (output.parent / file).is_file()
        and not management.processing_interrupted()
    )
    assert len((output / "pixart_training" / "met_001" / "log.jsonl").read_text().splitlines()) == 1


def test_interrupted_before_the_first_step_the_prompt_ends(run_node, make_model, features, management):
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        run_node("PixArtTrainLoRA", model=make_model(), features=features, name="never", rank=2, targets="attention",
                 **USUAL)  # fmt: skip
    assert not management.processing_interrupted()


def test_validation_pictures_of_prompts_and_of_the_dataset(run_node, make_model, features, output):
    class Vae:
        def decode(self, latent):
            return torch.nn.functional.interpolate(latent[:, :3], scale_factor=8).movedim(1, -1).sigmoid()

    prompts = [[torch.randn(2, 5, CONFIG.caption_channels), {"attention_mask": torch.ones(2, 5, dtype=torch.bool)}]]
    more = {"rank": 2, "targets": "attention", "sample_every": 2, "sample_steps": 2, "vae": Vae(), **USUAL}
    *_, samples = run_node("PixArtTrainLoRA", model=make_model(), features=features, name="seen",
                           validation=prompts, **more)  # fmt: skip
    assert samples.shape == (1, 3 * (64 + 16), 2 * 64, 3)  # before, after 2 steps, at the end
    run_node("PixArtTrainLoRA", model=make_model(), features=features, name="own", **more)
    assert len(list((output / "pixart_training" / "own_001" / "samples").glob("*.png"))) == 3


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"name": "../up"}, "Name of the training cannot be used"),
        ({"learning_rate": 0.0}, "Learning rate is out of range: got 0"),
        ({"learning_rate": 5.0}, "Learning rate is out of range: got 5"),
        ({"rank": 0}, "Rank is out of range"),
        ({"more_settings": "rnk: 3"}, "Unknown settings: got rnk"),
        ({"more_settings": "nothing"}, "Further settings cannot be read"),
        ({"features": make_features(count=0)}, "Empty dataset"),
    ],
)
def test_bad_input_is_refused_before_any_work(run_node, make_model, features, output, fields, match):
    usual = {"model": make_model(), "features": features, "name": "bad", "rank": 2, "targets": "attention", **USUAL}
    with pytest.raises(ValueError, match=match):
        run_node("PixArtTrainLoRA", **{**usual, **fields})
    assert not list((output / "pixart_training").glob("bad*"))


def test_captions_of_another_text_encoder_are_refused(run_node, make_model, features):
    other = make_model(config=tiny_config(caption_channels=32))
    with pytest.raises(ValueError, match="Caption width mismatch: got 24, expected 32"):
        run_node("PixArtTrainLoRA", model=other, features=features, name="wide", rank=2, targets="attention", **USUAL)


def test_more_settings_win(run_node, make_model, features, output):
    run_node("PixArtTrainLoRA", model=make_model(), features=features, name="more", rank=2, targets="attention",
             more_settings="loss: huber\nsteps: 2\ntimestep_weights: [[0, 1], [999, 2]]", **USUAL)  # fmt: skip
    assert len((output / "pixart_training" / "more_001" / "log.jsonl").read_text().splitlines()) == 2


def test_a_model_without_a_null_caption_uses_the_datasets(run_node, pack, features):
    module = importlib.import_module("pixart_pack.nodes.host.denoiser.model")
    weights = make_weights(CONFIG)
    del weights["y_embedder.y_embedding"]
    model = module.make_patcher(weights, CONFIG, torch.float32)
    trained, *_ = run_node("PixArtTrain", model=model, features=features, name="null", method="fine-tune", **USUAL)
    assert not trained.model.has_null_caption


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Pictures of 64 px in a cache on disk, by functions in place of T5 and the autoencoder."""
    records = [Record(f"{number}", TensorPicture(torch.rand(64, 64, 3)), f"picture {number}") for number in range(3)]
    encoder = DatasetEncoder(records, tmp_path_factory.mktemp("cache"), EncodeSettings(64), "t5", "vae")
    encoder.encode_captions(lambda texts: [torch.randn(len(text) + 1, CONFIG.caption_channels) for text in texts])
    encoder.encode_pictures(lambda pixels: (torch.randn(len(pixels), 4, 8, 8), None))
    return encoder.features()


def test_an_exported_config_trains_the_model_that_was_connected(run_node, pack, encoded, output, tmp_path):
    """Of a file with two sets of weights and no sign of its size; and what differs is told."""
    loading = importlib.import_module("pixart_pack.nodes.host.loading")
    file = tmp_path / "both.pth"
    torch.save({"state_dict": make_weights(CONFIG, 1), "state_dict_ema": make_weights(CONFIG, 2)}, file)
    with torch.inference_mode():
        model = loading.load_patcher(file, "alpha-512", "default", "model")
    assert model.model.pixart_config.base_size == 32 != loading.load_patcher(file).model.pixart_config.base_size
    exported, *_ = run_node("PixArtExportTrainingConfig", kind="LoRA", model=model, features=encoded, name="exported",
                            rank=2, targets="attention", prior_weight=0.5, **USUAL)  # fmt: skip
    path = output.parent / exported
    config = read_config(path)
    assert (config.variant, config.weights, config.settings.prior_weight) == ("alpha-512", "model", 0.5)
    _, graphs, *_ = run_node("PixArtTrainLoRA", model=model, features=encoded, name="as_exported", rank=2,
                             targets="attention", prior_weight=0.5, **USUAL)  # fmt: skip
    run = train_command.run_config(config, "cpu")
    assert run.objective.model.config == model.model.pixart_config
    assert same(load_file(run.file), load_file(output.parent / graphs))
    for change, match in [
        ({"weights": "ema"}, "got other numbers in .*more"),
        ({"variant": "auto"}, "got base_size .* instead of 32"),
        ({"data": "0"}, "Other pictures or captions than were exported"),
    ]:
        with pytest.raises(ValueError, match=match):
            train_command.run_config(replace(config, **change), "cpu")


def test_an_exported_config_holds_a_model_with_loras_whole(run_node, make_model, features, encoded, output):
    usual = {"rank": 2, "targets": "attention", **USUAL, "learning_rate": 0.1}
    patched, *_ = run_node("PixArtTrainLoRA", model=make_model(), features=features, name="below", **usual)
    exported, *_ = run_node("PixArtExportTrainingConfig", kind="fine-tune", model=patched, features=encoded,
                            name="whole_one", **usual)  # fmt: skip
    config = read_config(output.parent / exported)
    assert config.model.endswith("whole_one.model.safetensors") and config.settings.train_variance
    weights = train_command.load_model(config.model).state_dict()
    before = weights_of(patched)
    assert all(torch.equal(weights[name], before[name]) for name in weights if name in before)


def test_an_exported_training_needs_a_dataset_on_disk(run_node, make_model, features):
    with pytest.raises(ValueError, match="Encoded pictures are not on disk"):
        run_node("PixArtExportTrainingConfig", kind="LoRA", model=make_model(), features=features, name="x", rank=2,
                 targets="attention", **USUAL)  # fmt: skip
