"""The dataset nodes in ComfyUI's own classes: the demo's T5 and VAE, and a KL autoencoder with a posterior."""

import importlib
import shutil
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pixart_pack.demo.autoencoder import VAE_SCALE, average_latents
from pixart_pack.pixart.data.examples import collate
from pixart_pack.tests import tiny_t5

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = ROOT / "demo" / "models"
CAPTIONS = ("a large red circle in the center", "a small blue square in the top left on a white background", "x")


@pytest.fixture(scope="module")
def places(pack):
    """The host's input, output and model folders, emptied afterwards."""
    folder_paths = importlib.import_module("folder_paths")
    found = SimpleNamespace(
        input=Path(folder_paths.get_input_directory()),
        output=Path(folder_paths.get_output_directory()),
        models=Path(folder_paths.models_dir),
    )
    for folder in (found.input, found.output, *(found.models / name for name in ("vae", "text_encoders"))):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("vae/pixart_demo_vae.safetensors", "text_encoders/pixart_demo_t5.safetensors"):
        shutil.copy(MODELS / name, found.models / name)
    folder_paths.filename_list_cache.clear()
    yield found
    for folder in (found.input, found.output, *(found.models / name for name in ("vae", "text_encoders"))):
        shutil.rmtree(folder)
        folder.mkdir()  # the host remembers which folders there are


@pytest.fixture(scope="module")
def encoders(places):
    t5 = importlib.import_module("pixart_pack.nodes.host.text.t5")
    loading = importlib.import_module("pixart_pack.nodes.host.loading")
    clip = t5.load_t5(places.models / "text_encoders" / "pixart_demo_t5.safetensors")
    return {"clip": clip, "vae": loading.read_vae(places.models / "vae" / "pixart_demo_vae.safetensors")}


@pytest.fixture
def folder(places, request):
    """A folder `set` in the input folder: three pictures of two sizes."""
    folder = places.input / "set"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(places.output / "pixart_cache", ignore_errors=True)
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        size = (96, 160) if number == 2 else (128, 128)
        noise = np.random.default_rng(number).integers(0, 255, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
        Image.fromarray(noise.repeat(8, 0).repeat(8, 1)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def settings(**changes):
    return {"resolution": 128, "caption_length": 20, **changes}


def encode(run_node, encoders, **changes):
    dataset, _ = run_node("PixArtDataset", path="set", kind="auto")
    return run_node("PixArtEncodeDataset", dataset=dataset, **encoders, **settings(**changes))


def test_a_folder_becomes_features(run_node, encoders, folder):
    features, report = encode(run_node, encoders)
    assert report == "3 encoded pictures, captions of width 64\n128 x 128: 2\n160 x 96: 1"
    picture = torch.tensor(np.asarray(Image.open(folder / "1.png"))).float().movedim(-1, 0)[None] / 255
    expected = average_latents(picture)[0] / VAE_SCALE
    assert (features[1].latent - expected).abs().max() < 0.01  # the encoder sums many averages; then over 0.18
    text = importlib.import_module("pixart_pack.nodes.host.text.captions")
    states = text.encode_captions(encoders["clip"], [CAPTIONS[1]], 20)[0][0][0][0]
    assert torch.equal(features[1].caption, states.half())
    assert features.null_caption.shape == (1, 64)
    assert features.path.parent.name == "dataset" and not features[0].latent.is_inference()
    assert collate([features[0], features[1]]).latent.shape == (2, 4, 16, 16)
    loaded, _ = run_node("PixArtLoadFeatures", path="pixart_cache/dataset")
    assert torch.equal(loaded[2].latent, features[2].latent)


def test_variants_masks_and_shares(run_node, encoders, folder):
    """One set with masks beside its pictures and two views, another of the same pictures with its share."""
    named = folder.parent / "5_thing"
    named.mkdir()
    for number in range(2):
        Image.open(folder / f"{number}.png").resize((96, 96)).save(named / f"{number}.jpg")
    Image.new("L", (96, 96), 255).save(named / "1-masklabel.png")
    try:
        few, report = run_node("PixArtDataset", path=named.name, kind="folder", masks="files",
                               folder_names="10_cat shows pictures 10 times")  # fmt: skip
        assert report == "2 pictures, 1 with a mask"
        many, _ = run_node("PixArtDataset", path=folder.name, kind="auto")
        words = {"trigger": "sks", "views": 2, "mirror": 1.0, "add_to": many, "share": 2.0}
        dataset, report = run_node("PixArtVaryDataset", dataset=few, **words)
        assert "captions: 2 are encoded, 1 a picture, such as 'sks, thing'" in report and "shares: 1 to 2" in report
        features, report = run_node("PixArtEncodeDataset", dataset=dataset, **encoders, **settings(name="varied"))
    finally:
        shutil.rmtree(named)
    assert "captions of width 64, with variants, with masks, with repeats\n" in report
    assert features.repeats.tolist() == pytest.approx([5 / 3, 5 / 3, 5 / 3, 5, 5])  # 10 of the few by their names
    assert features[4].text == "sks, thing" and features[4].mask.min() == 1 and features[3].mask is None
    views = [features.draw(3, Random(number)).latent for number in range(8)]
    assert any((view - views[0].flip(-1)).abs().max() < 0.02 for view in views)


def test_nothing_is_encoded_twice_and_what_changed_is(run_node, encoders, folder, monkeypatch):
    encode(run_node, encoders)
    shards = set(folder.parent.parent.joinpath("output", "pixart_cache", "dataset").glob("*.safetensors"))
    vae = encoders["vae"]
    calls = []
    monkeypatch.setattr(
        type(vae), "encode", lambda self, pixels: calls.append(len(pixels)) or torch.zeros(1, 4, 12, 20)
    )
    encode(run_node, encoders)
    assert not calls and set(next(iter(shards)).parent.glob("*.safetensors")) == shards
    (folder / "0.txt").write_text("something else")
    features, _ = encode(run_node, encoders)
    assert not calls and features[0].text == "something else"


def test_captions_of_a_dataset_do_not_drive_prompts_out_of_their_cache(run_node, encoders, folder):
    prompt_cache = importlib.import_module("pixart_pack.nodes.host.text.prompt_cache")
    shutil.rmtree(prompt_cache.folder(), ignore_errors=True)
    encode(run_node, encoders)
    assert not list(prompt_cache.folder().glob("*"))


def test_captions_that_were_cut_are_in_the_report(run_node, encoders, folder):
    _, report = encode(run_node, encoders, caption_length=2, name="cut")
    assert "cut at 2 tokens, without their ends: " in report


def test_t5_and_vae_leave_memory_and_others_stay(run_node, encoders, folder, comfy):
    management = importlib.import_module("comfy.model_management")
    patching = importlib.import_module("comfy.model_patcher")
    cpu = torch.device("cpu")
    other = patching.ModelPatcher(torch.nn.Linear(2, 2), load_device=cpu, offload_device=cpu)
    other.model.current_weight_patches_uuid = None
    management.load_models_gpu([other])
    encode(run_node, encoders)
    loaded = [entry.model for entry in management.current_loaded_models]
    assert any(patcher is other for patcher in loaded)
    assert not any(patcher is each.patcher for patcher in loaded for each in encoders.values())


def test_a_patched_text_encoder_is_another(encoders):
    encoding = importlib.import_module("pixart_pack.nodes.host.training.encoding")
    clip = encoders["clip"].clone()
    plain = encoding._identify_clip(clip)
    assert plain == encoding._identify_clip(encoders["clip"])
    key = next(name for name in clip.patcher.model.state_dict() if name.endswith("layer.0.SelfAttention.q.weight"))
    clip.add_patches({key: (torch.ones(64, 64),)}, 0.5)
    patched = encoding._identify_clip(clip)
    assert patched != plain
    clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))  # the patch is now computed into the weights
    assert encoding._identify_clip(clip) == patched
    other = encoders["clip"].clone()
    other.add_patches({key: (torch.ones(64, 64),)}, 0.7)
    shallow = encoders["clip"].clone()
    shallow.clip_layer(-2)
    assert len({plain, patched, encoding._identify_clip(other), encoding._identify_clip(shallow)}) == 4


def test_a_kl_autoencoder_gives_its_deviation(run_node, encoders, folder, places):
    diffusers = pytest.importorskip("diffusers")
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
    }
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(**config, latent_channels=4).eval()
    save_file(network.state_dict(), places.models / "vae" / "kl.safetensors")
    loading = importlib.import_module("pixart_pack.nodes.host.loading")
    vae = loading.read_vae(places.models / "vae" / "kl.safetensors")
    features, _ = encode(run_node, {**encoders, "vae": vae}, batch_size=2)
    picture = torch.tensor(np.asarray(Image.open(folder / "1.png"))).float().movedim(-1, 0)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = network.encode(picture).latent_dist
    # The picture's own resizing to the same size, and the order of sums in two implementations of float32.
    assert (features[1].latent - posterior.mean[0]).abs().max() < 1e-3
    assert (features[1].deviation - posterior.std[0]).abs().max() < 1e-3


def test_mirror_control_and_prior(run_node, encoders, folder):
    dataset, report = run_node("PixArtDataset", path="set", kind="auto", is_prior=True)
    assert report.startswith("3 pictures, 3 of the class to keep")
    image = torch.rand(1, 128, 128, 3)
    both, report = run_node("PixArtDatasetFromImages", images=[image], captions=["a dog"], add_to=[dataset])
    assert len(both) == 4 and "1 pictures" in report
    choices = settings(flip=True, control="soft edges", size_condition="picture", bins="square")
    features, report = run_node("PixArtEncodeDataset", dataset=both, **encoders, **choices)
    assert len(features) == 8 and "with control pictures" in report and set(features.bins) == {(16, 16)}
    assert [features[index].is_prior for index in (0, 5, 6, 7)] == [True, True, False, False]
    assert torch.allclose(features[7].latent, features[6].latent.flip(-1), atol=0.02)
    assert features[4].size_px == (96, 160) and features[6].hint.abs().max() > 0


def test_the_check_is_the_nodes_output(run_node, encoders, folder):
    (folder / "page.jpg").write_text("<html>")
    _, report = run_node("PixArtDataset", path="set", kind="folder", smallest=100)
    assert report.splitlines()[:2] == ["2 pictures; 2 left out", "no caption: 1, too small: 1, unreadable: 1"]
    with pytest.raises(ValueError, match="Dataset with problems"):
        run_node("PixArtDataset", path="set", kind="folder", problems="error")


def test_paths_stay_in_the_input_folder_unless_absolute(run_node, folder, places):
    with pytest.raises(ValueError, match="Path leads out of ComfyUI's input folder: got '../output'"):
        run_node("PixArtDataset", path="../output", kind="auto")
    with pytest.raises(FileNotFoundError, match="Dataset not found: got ''"):
        run_node("PixArtDataset", path="", kind="auto")
    dataset, _ = run_node("PixArtDataset", path=f'"{folder}"', kind="auto")
    assert len(dataset) == 3
    with pytest.raises(ValueError, match="Unusable file name: got '../x' .*stays in output/pixart_cache"):
        run_node("PixArtEncodeDataset", dataset=dataset, clip=None, vae=None, **settings(name="../x"))


def test_a_changed_file_changes_the_nodes_fingerprint(pack, folder):
    node = next(each for each in pack if each.GET_SCHEMA().node_id == "PixArtDataset")
    before = node.fingerprint_inputs(path="set", kind="auto")
    assert before == node.fingerprint_inputs(path="set", kind="auto")
    (folder / "0.txt").write_text("another caption")
    assert node.fingerprint_inputs(path="set", kind="auto") != before
    assert node.fingerprint_inputs(path="nowhere") == node.fingerprint_inputs(path="../..")
    assert node.fingerprint_inputs(path=None, kind=None, caption=None) == node.fingerprint_inputs()  # all connected


def test_a_changed_picture_elsewhere_changes_the_nodes_fingerprint(pack, folder, tmp_path):
    node = next(each for each in pack if each.GET_SCHEMA().node_id == "PixArtDataset")
    (tmp_path / "t.csv").write_text(f"bild,text\n{folder / '1.png'},a\n", encoding="utf-8")
    inputs = {"path": str(tmp_path / "t.csv"), "kind": "csv", "picture_column": "bild"}
    before = node.fingerprint_inputs(**inputs)
    (tmp_path / "other.txt").write_text("no part of the table")
    assert node.fingerprint_inputs(**inputs) == before
    shutil.copy(folder / "0.png", folder / "1.png")
    assert node.fingerprint_inputs(**inputs) != before


def test_features_are_opened_again_when_they_were_encoded_again(run_node, pack, encoders, folder):
    node = next(each for each in pack if each.GET_SCHEMA().node_id == "PixArtLoadFeatures")
    encode(run_node, encoders)
    before = node.fingerprint_inputs(path="pixart_cache/dataset")
    assert before == node.fingerprint_inputs(path="pixart_cache/dataset") != node.fingerprint_inputs(path="nowhere")
    (folder / "0.txt").write_text("another caption")
    encode(run_node, encoders)
    after = node.fingerprint_inputs(path="pixart_cache/dataset/features.json")
    assert after == node.fingerprint_inputs(path="pixart_cache/dataset") != before


def test_wrong_encoders_end_before_anything_is_encoded(run_node, encoders, folder):
    dataset, _ = run_node("PixArtDataset", path="set", kind="auto")
    with pytest.raises(ValueError, match="Not connected: got no model, with resolution or caption_length 0"):
        run_node("PixArtEncodeDataset", dataset=dataset, **encoders)
    wide = SimpleNamespace(latent_channels=16)
    with pytest.raises(ValueError, match="Wrong autoencoder: got 16 latent channels"):
        run_node("PixArtEncodeDataset", dataset=dataset, clip=encoders["clip"], vae=wide, **settings())


def test_pictures_and_captions_in_the_graph(run_node):
    images = [torch.rand(2, 64, 96, 3), torch.rand(1, 128, 64, 4)]
    dataset, _ = run_node("PixArtDatasetFromImages", images=images, captions=["one\ntwo\n\nthree"])
    assert [record.caption for record in dataset.records] == ["one", "two", "three"]
    dataset, _ = run_node("PixArtDatasetFromImages", images=images, captions=["a photo of sks dog"], control=images)
    assert {record.caption for record in dataset.records} == {"a photo of sks dog"} and dataset.records[2].control
    dataset, _ = run_node("PixArtDatasetFromImages", images=images, captions=["a\nb", "c", "d"])
    assert dataset.records[0].caption == "a\nb"
    with pytest.raises(ValueError, match="Wrong number of captions: got 2, expected 3"):
        run_node("PixArtDatasetFromImages", images=images, captions=["a\nb"])
    with pytest.raises(ValueError, match="Wrong number of control pictures: got 2, expected 3"):
        run_node("PixArtDatasetFromImages", images=images, captions=["a"], control=images[:1])
    with pytest.raises(ValueError, match="Wrong number of captions: got 0, expected 3"):
        run_node("PixArtDatasetFromImages", images=images, captions=[" "])


def test_the_hosts_training_dataset(run_node, core_nodes, encoders):
    """Make Training Dataset and Resolution Bucket, where the host has them."""
    images = [torch.rand(1, 64, 96, 3), torch.rand(1, 64, 64, 3), torch.rand(1, 64, 96, 3)]
    make, bucket = core_nodes["MakeTrainingDataset"], core_nodes["ResolutionBucket"]
    vae, clip = encoders["vae"], encoders["clip"]
    with torch.inference_mode():
        latents, conditioning = make.execute(images, [vae], [clip], ["one", "two two", "three"]).result
        empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        buckets = bucket.execute(latents, conditioning).result
    features, report = run_node("PixArtDatasetFromLatents", latents=latents, conditioning=conditioning, empty=[empty])
    assert features.bins == [(8, 12), (8, 8), (8, 12)] and "96 x 64: 2" in report
    assert torch.equal(features[1].caption, conditioning[1][0][0][0]) and features[1].size_px == (64, 64)
    assert features.null_caption.shape == (1, 64) and not features[0].latent.is_inference()
    # The host's buckets hold each caption as an entry of its own.
    sorted_out, _ = run_node("PixArtDatasetFromLatents", latents=buckets[0], conditioning=buckets[1])
    assert sorted_out.bins == [(8, 12), (8, 12), (8, 8)]
    assert torch.equal(sorted_out[1].caption, features[2].caption)


def test_masked_batches_of_captions(run_node, encoders):
    text = importlib.import_module("pixart_pack.nodes.host.text.captions")
    conditioning, _ = text.encode_captions(encoders["clip"], ["one", "two of them here"], 20)
    latent = {"samples": torch.randn(2, 4, 6, 10)}
    features, _ = run_node("PixArtDatasetFromLatents", latents=[latent], conditioning=[conditioning])
    lengths = conditioning[0][1]["attention_mask"].sum(1).tolist()
    assert [len(features[index].caption) for index in range(2)] == lengths and lengths[0] < lengths[1]
    assert features[0].aspect_ratio == 0.6 and features[0].size_px == (48, 80)
    three = {"samples": torch.randn(3, 4, 6, 10)}
    with pytest.raises(ValueError, match="got 2 captions for 3 latents"):
        run_node("PixArtDatasetFromLatents", latents=[three], conditioning=[conditioning])
    with pytest.raises(ValueError, match="Latents and captions do not match: got 3 and 2"):
        run_node("PixArtDatasetFromLatents", latents=[latent] * 3, conditioning=[conditioning] * 2)
    with pytest.raises(ValueError, match=r"Wrong latent: got the shape \(2, 16, 6, 10\)"):
        wrong = {"samples": torch.randn(2, 16, 6, 10)}
        run_node("PixArtDatasetFromLatents", latents=[wrong], conditioning=[conditioning])


def test_an_identity_stays_when_a_model_is_used(encoders):
    """The identity does not depend on where weights are or whether they are in use."""
    encoding = importlib.import_module("pixart_pack.nodes.host.training.encoding")
    vae = encoders["vae"]
    before = encoding._identify(vae.patcher)
    vae.encode(torch.rand(1, 64, 64, 3))
    assert encoding._identify(vae.patcher) == before


@pytest.mark.parametrize("scaled", [False, True])
def test_an_fp8_text_encoder_has_an_identity(places, scaled):
    t5 = importlib.import_module("pixart_pack.nodes.host.text.t5")
    encoding = importlib.import_module("pixart_pack.nodes.host.training.encoding")
    weights = tiny_t5.weights_of(tiny_t5.make_t5())
    found = set()
    for seed in range(2):
        weights["encoder.block.1.layer.0.SelfAttention.q.weight"] += seed * 0.1
        plain = {
            name: weight.to(torch.float8_e4m3fn) if weight.ndim == 2 else weight for name, weight in weights.items()
        }
        path = places.models / "text_encoders" / f"fp8_{scaled}_{seed}.safetensors"
        save_file(tiny_t5.scale_to_fp8(weights)[0] if scaled else plain, path)
        clip = t5.load_t5(path)
        before = encoding._identify_clip(clip)
        clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
        assert encoding._identify_clip(clip) == before
        found.add(before)
    assert len(found) == 2
