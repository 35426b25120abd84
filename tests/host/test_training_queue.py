"""Training through the prompt queue of a real server, with the demo's models: train, then sample with the result."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_pack.demo.client import PromptError
from pixart_pack.pixart.lora import read_lora
from pixart_pack.pixart.training.report import read_log
from pixart_pack.pixart.training.settings import read_config
from pixart_pack.tests import processes
from pixart_pack.tests.host.graph import VAE, Graph
from pixart_pack.tests.stages.tiny_dit import DiT

MODEL, T5 = "pixart_demo.safetensors", "pixart_demo_t5.safetensors"


@pytest.fixture
def folder(host, request):
    """Pictures with captions in the server's input folder, named as the test."""
    folder = host.models.parent / "input" / request.node.originalname
    write_pictures(folder)
    return folder


def write_pictures(folder, first=0):
    """Three pictures of noise, from this number on, with their captions, and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(first, first + 3):
        noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a picture of noise number {number}", encoding="utf-8")


class TrainingGraph(Graph):
    """Up to the encoded pictures; `train` ends it or goes on to a picture."""

    def __init__(self, folder):
        super().__init__()
        self.name = folder.name
        self.model = self.add("PixArtLoadCheckpoint", checkpoint=MODEL)
        self.clip, self.vae = self.add("PixArtLoadT5", text_encoder=T5), self.add("VAELoader", vae_name=VAE)
        self.dataset = self.add("PixArtDataset", path=folder.name, kind="auto")
        self.features = self.encode(self.dataset, folder.name)

    def encode(self, dataset, name):
        """The encoded pictures of a dataset, kept under a name."""
        usual = {"clip": self.clip, "vae": self.vae, "resolution": 64, "caption_length": 20}
        return self.add("PixArtEncodeDataset", dataset=dataset, name=name, **usual)

    def train(self, node="PixArtTrainLoRA", **changes):
        """The training node; returns its first output."""
        usual = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "seed": 0, "name": self.name}
        if node == "PixArtTrainLoRA":
            usual |= {"rank": 4, "targets": "attention"}
        return self.add(node, **{"model": self.model, "features": self.features, **usual, **changes})

    def sample(self, model):
        """A picture by the trained model."""
        text = self.add("PixArtTextEncode", clip=self.clip, text="a picture of noise")
        none = self.add("PixArtNegative", mode="empty", clip=self.clip)
        latent = self.add("EmptyLatentImage", width=64, height=64, batch_size=1)
        settings = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        samples = self.add("KSampler", model=model, positive=text, negative=none, latent_image=latent, **settings)
        pixels = self.add("VAEDecode", samples=samples, vae=self.vae)
        return self.add("SaveImage", images=pixels, filename_prefix=self.name)


def texts_of(events):
    executed = ((data["node"], data["output"] or {}) for kind, data in events if kind == "executed")
    return {node: output["text"][0] for node, output in executed if output.get("text")}  # none of a cached node


def test_a_lora_is_trained_and_sampled_in_one_prompt(host, folder):
    graph = TrainingGraph(folder)
    prompts = graph.add("PixArtTextEncode", clip=graph.clip, text="a picture of noise")
    trained = graph.train(sample_every=2, sample_steps=2, vae=graph.vae, validation=prompts)
    graph.sample(trained)
    for output in (2, 3):
        graph.add("PreviewImage", images=[trained[0], output])
    graph.add("PreviewAny", source=[trained[0], 1])
    events = host.events(graph.nodes, 300)
    assert texts_of(events)[trained[0]].splitlines()[0] == "done: 4 of 4 steps"
    assert [kind for kind, _ in events].count("preview") >= 2
    file = host.output / "loras" / f"{folder.name}_001.safetensors"
    assert not read_lora(file).unmatched
    loaders = host.object_info("LoraLoaderModelOnly")["input"]["required"]["lora_name"]
    assert file.name in str(loaders)
    host_graph = TrainingGraph(folder)
    plain = host_graph.add("LoraLoaderModelOnly", model=host_graph.model, lora_name=file.name, strength_model=1.0)
    ours = host_graph.add("PixArtLoadLoRA", model=host_graph.model, lora=file.name, strength=1.0)
    pictures = [host_graph.sample(model) for model in (plain, ours)]
    assert len(pictures) == 2 and len(host.run(host_graph.nodes, timeout_s=120)) == 2


def test_a_training_begins_with_a_lora_and_is_measured_on_a_set_of_its_own(host, folder):
    other = folder.with_name(f"{folder.name}_other")
    write_pictures(other, first=3)
    first = TrainingGraph(folder)
    first.train()
    host.run(first.nodes, timeout_s=300)
    file = host.output / "loras" / f"{folder.name}_001.safetensors"
    graph = TrainingGraph(folder)
    alone = graph.encode(graph.add("PixArtDataset", kind="auto", path=other.name), other.name)
    more = {"start_from": file.name, "validation_features": alone, "more_settings": "validation_every: 2"}
    trained = graph.train(name=other.name, rank=8, learning_rate=1e-6, **more)
    graph.add("PixArtExportTrainingConfig", kind="LoRA", model=graph.model, features=graph.features,
                       start_from=file.name, validation_features=alone, name=other.name, seed=0, steps=4, batch_size=2,
                       learning_rate=1e-3, rank=4, targets="attention")  # fmt: skip
    said = texts_of(host.events(graph.nodes, 300))[trained[0]]
    assert "begins with a LoRA: rank 4 of the file instead of 8" in said, said
    runs = host.output / "pixart_training"
    log = runs / f"{other.name}_001" / "log.jsonl"
    measured = [json.loads(line) for line in log.read_text().splitlines() if "validation" in line]
    assert [entry["step"] for entry in measured] == [0, 2, 4]
    one, two = (read_lora(host.output / "loras" / f"{name}_001.safetensors") for name in (folder.name, other.name))
    for target, factor in one.factors.items():  # four steps of a millionth
        torch.testing.assert_close(two.factors[target].down, factor.down, atol=1e-5, rtol=0)
    config = read_config(runs / f"{other.name}.yaml")
    assert config.start_from == str(file.resolve()) and config.validation_features.endswith("features.json")


def test_a_varied_dataset_teaches_another_adapter_on_a_model_in_8_bits(host, folder):
    graph = TrainingGraph(folder)
    graph.nodes[graph.model[0]]["inputs"]["weight_dtype"] = "int8"
    varied = graph.add("PixArtVaryDataset", dataset=graph.dataset, trigger="sks", views=2, mirror=1.0, repeats=2.0)
    features = graph.encode(varied, folder.name)
    trained = graph.train(features=features, adapter="lokr", steps=2)
    graph.sample(graph.model)
    graph.sample(trained)
    events = host.events(graph.nodes, 300)
    texts = texts_of(events)
    assert "'sks, a picture of noise number 0'" in texts[varied[0]] and "with variants" in texts[features[0]], texts
    assert texts[trained[0]].splitlines()[0] == "done: 2 of 2 steps"
    lora = read_lora(host.output / "loras" / f"{folder.name}_001.safetensors")
    assert not lora.unmatched and {factor.title for factor in lora.factors.values()} == {"LoKr"}
    plain, taught = (
        np.asarray(Image.open(path), np.int16) for path in sorted(host.output.glob(f"{folder.name}_0*.png"))
    )
    assert plain.std() > 5 and (plain != taught).any()


def test_a_lora_keeps_to_what_the_model_made_of_prior_pictures(host, folder):
    prior = folder.with_name(f"{folder.name}_prior")
    write_pictures(prior, first=3)
    graph = TrainingGraph(folder)
    more = {"kind": "auto", "is_prior": True, "path": prior.name}
    both = graph.encode(graph.add("PixArtDataset", **more, add_to=graph.dataset), f"{folder.name}_both")
    alone = graph.encode(graph.add("PixArtDataset", **more), f"{folder.name}_alone")
    for features in (both, alone):
        name = graph.nodes[features[0]]["inputs"]["name"]
        trained = graph.train(features=features, name=name, prior_target="model", prior_weight=2.0)
        saved = graph.sample(trained)
    messages = host.events(graph.nodes, 300)
    assert saved[0] in {data["node"] for kind, data in messages if kind == "executed"}
    runs = host.output / "pixart_training"
    losses = [[entry["loss"] for entry in read_log(runs / f"{folder.name}_{name}_001" / "log.jsonl")]
              for name in ("both", "alone")]  # fmt: skip
    assert len(losses[0]) == 4 and min(losses[0]) > 0
    assert losses[1] == [0.0] * 4  # a LoRA that adds nothing yet has nothing to learn from the model's own predictions


def test_a_model_out_of_a_dit_is_grown_trained_at_two_sizes_and_sampled_with_a_reference(host, folder):
    torch.manual_seed(0)
    dit = DiT(side=4)
    (host.models / "diffusion_models").mkdir(parents=True, exist_ok=True)
    torch.save(dit.state_dict(), host.models / "diffusion_models" / "tiny_dit.pt")
    graph = TrainingGraph(folder)
    started = graph.add("PixArtStartFromDiT", dit="tiny_dit.pt", caption_width=64)
    grown = graph.add("PixArtGrow", model=started, stage="size in pixels", size_px=96)
    graph.nodes[graph.features[0]]["inputs"] |= {"more_resolutions": "96", "spread": "each"}
    trained = graph.train("PixArtTrain", model=grown, method="fine-tune", steps=2, learning_rate=1e-4)
    picture = graph.add("LoadImage", image=f"{folder.name}/0.png")
    more = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    graph.sample(graph.add("PixArtReference", model=trained, image=picture, vae=graph.vae, **more))
    texts = texts_of(host.events(graph.nodes, 300))
    assert "grown from alpha at 64 px to alpha at 96 px" in texts[grown[0]]
    assert texts[trained[0]].splitlines()[0] == "done: 2 of 2 steps"
    sizes = texts[graph.features[0]]
    assert "64 x 64: 3" in sizes and "96 x 96: 3" in sizes, sizes


def test_a_model_of_one_step_is_distilled_and_sampled(host, folder):
    graph = TrainingGraph(folder)
    trained = graph.train("PixArtDistillDMD", method="LoRA", dmd_guidance=2.0, steps=2, rank=2, targets="attention")
    graph.sample(trained)
    graph.nodes[str(len(graph.nodes) - 2)]["inputs"] |= {
        "steps": 1, "cfg": 1.0, "sampler_name": "pixart_dmd", "scheduler": "pixart_dmd",
    }  # fmt: skip
    assert texts_of(host.events(graph.nodes, 300))[trained[0]].splitlines()[0] == "done: 2 of 2 steps"
    assert not read_lora(host.output / "loras" / f"{folder.name}_001.safetensors").unmatched


def test_two_trainings_queued_at_once_work_one_after_the_other(host, folder):
    jobs = []
    for name in ("first", "second"):
        graph = TrainingGraph(folder)
        graph.train(name=f"{folder.name}_{name}", steps=6)
        jobs.append(host.queue(graph.nodes))
    for job in jobs:
        host.wait(job, 300)
    for name in ("first", "second"):
        assert (host.output / "loras" / f"{folder.name}_{name}_001.safetensors").is_file()


def test_an_interruption_ends_the_training_the_graph_goes_on_and_so_does_the_training_once_queued_again(host, folder):
    steps, stopped = 150, []
    graph = TrainingGraph(folder)
    name = graph.add("PrimitiveString", value=folder.name)
    trained = graph.train(steps=steps, name=name, sample_every=50)
    saved = graph.sample(trained)
    log = host.output / "pixart_training" / f"{folder.name}_001" / "log.jsonl"

    def made():
        """The steps that a queueing makes, the nodes that it runs, and what they say."""
        before, messages = len(log.read_text().splitlines()) if log.exists() else 0, []

        def follow(kind, data):
            messages.append((kind, data))
            if kind == "progress" and data.get("node") == trained[0] and not stopped and data["value"] >= 3:
                stopped.append(True)
                host.interrupt()

        host.wait(host.queue(graph.nodes), 300, follow)
        ran = {data["node"] for kind, data in messages if kind == "executing"}
        return len(log.read_text().splitlines()) - before, ran, texts_of(messages).get(trained[0], "")

    first, ran, text = made()
    assert 3 <= first < steps and saved[0] in ran
    assert "queue it again to go on" in text and "no validation pictures: connect a vae" in text
    assert (host.output / "loras" / f"{folder.name}_001.safetensors").is_file()
    second, ran, text = made()
    assert second == steps - first and saved[0] in ran and f"done: {steps} of {steps} steps" in text
    third, ran, _ = made()
    assert third == 0 and trained[0] not in ran
    assert not log.parent.with_name(f"{folder.name}_002").exists()


def test_a_name_that_leads_out_of_its_folder_is_refused(host, folder):
    graph = TrainingGraph(folder)
    graph.train(name="../../escape")
    with pytest.raises(PromptError, match="Name of the training cannot be used"):
        host.run(graph.nodes, timeout_s=120)


def test_a_training_is_exported_and_runs_on_the_command_line(host, folder):
    graph = TrainingGraph(folder)
    prompts = graph.add("PixArtTextEncode", clip=graph.clip, text="a picture of noise")
    settings = {"steps": 4, "batch_size": 1, "learning_rate": 1e-4, "seed": 3, "rank": 4, "targets": "blocks"}
    export = graph.add(
        "PixArtExportTrainingConfig", kind="LoRA", model=graph.model, features=graph.features, name=folder.name,
        sample_every=2, sample_steps=2, validation=prompts, **settings,
    )  # fmt: skip
    with pytest.raises(PromptError, match="No VAE for the validation pictures"):
        host.run(graph.nodes, timeout_s=120)
    graph.nodes[export[0]]["inputs"]["vae"] = graph.vae
    host.run(graph.nodes, timeout_s=120)
    file = host.output / "pixart_training" / f"{folder.name}.yaml"
    config = read_config(file)
    assert config.model.endswith(MODEL) and config.settings.targets == "blocks" and config.settings.seed == 3
    assert config.features.endswith("features.json") and config.validation.endswith(".prompts.safetensors")
    process = processes.Forked("pixart", "train", file, "--device", "cpu")
    _, errors = processes.finish(process)
    assert process.returncode == 0, errors
    run = file.parent / f"{folder.name}_001"
    assert not read_lora(run / f"{run.name}.safetensors").unmatched
    pictures = [np.asarray(Image.open(path)) for path in sorted((run / "samples").glob("*.png"))]
    assert [picture.shape for picture in pictures] == [(64, 64, 3)] * 3 and pictures[0].std() > 5
    # As the same training within the graph has them
    trained = TrainingGraph(folder)
    prompts = trained.add("PixArtTextEncode", clip=trained.clip, text="a picture of noise")
    trained.train(sample_every=2, sample_steps=2, vae=trained.vae, validation=prompts, resume=False, **settings)
    host.run(trained.nodes, timeout_s=300)
    for number, path in enumerate(sorted((file.parent / f"{folder.name}_002" / "samples").glob("*.png"))):
        assert np.abs(np.asarray(Image.open(path), np.int16) - pictures[number]).max() <= 2
