"""Evaluation: prompt files, resuming, sharing out, scores and the report."""

import json
import string
import sys
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pixart_pack.demo import prompt_scorer
from pixart_pack.demo.scenes import caption, draw_scene, random_scene
from pixart_pack.pixart.commands import evaluate
from pixart_pack.pixart.commands.console import run_command
from pixart_pack.pixart.commands.evaluate import plan, read_prompts
from pixart_pack.pixart.scores.measures import (
    INCEPTION,
    INCEPTION_URL,
    clip_scores,
    find_pictures,
    frechet_distance,
    load_clip,
    load_fid,
    load_scorer,
    measure,
)

LOGIT_SCALE = np.exp(2.6592)  # transformers' initial one of CLIP
COCO = {
    "images": [{"id": 7, "file_name": "7.jpg"}],
    "annotations": [
        {"id": 3, "image_id": 7, "caption": "second"},
        {"id": 1, "image_id": 7, "caption": "first\n"},
        {"id": 2, "image_id": 9, "caption": "other"},
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "a green bench\n\n a red book \n", ["a green bench", "a red book"]),
        ("a.txt", "a green bench\tbench\r\na red book\tbook\r\n", ["a green bench", "a red book"]),
        ("a.json", json.dumps(COCO), ["first", "other"]),
        ("a.json", '["a fox", {"path": "x.png", "prompt": "an owl"}]', ["a fox", "an owl"]),
    ],
)
def test_prompt_files(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(tmp_path / name) == expected
    assert read_prompts(tmp_path / name, 1) == expected[:1]


@pytest.mark.parametrize(("name", "content"), [("a.txt", "\n \n"), ("a.json", '{"a": 1}'), ("a.json", "{")])
def test_other_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="No prompts|Prompts cannot be read"):
        read_prompts(tmp_path / name)


def test_every_picture_has_a_seed_and_a_name_of_its_own(tmp_path):
    tasks = plan(["a/b", "c"], tmp_path, 2, 10, "compbench")
    assert [task.seed for task in tasks] == [10, 11, 12, 13]
    assert [task.path.name for task in tasks] == ["a b_000000.png", "a b_000001.png", "c_000002.png", "c_000003.png"]
    assert plan(["x" * 999], tmp_path, 1, 0, "compbench")[0].path.name == "x" * 200 + "_000000.png"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command with pictures of one colour for each seed; gives (exit code, the seeds made, what it says).

    Seeds of one batch are in one list.
    """
    seeds = []

    def maker(options):
        def make(tasks):
            seeds.append([task.seed for task in tasks] if len(tasks) > 1 else tasks[0].seed)
            return [Image.new("RGB", (24, 16), (task.seed * 20, 0, 0)) for task in tasks]

        return make, {"steps": options.steps}

    monkeypatch.setattr(evaluate, "local_maker", maker)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\nan owl\na hare\n")

    def command(*arguments):
        seeds.clear()
        usual = [prompts, "--output", tmp_path / "out", "--model", "x.pth", "--device", "cpu"]
        code = run_command(evaluate.main, evaluate.parse(), [str(each) for each in (*usual, *arguments)])
        said = capsys.readouterr()
        return code, list(seeds), said.out + said.err

    return command


def test_it_goes_on_where_it_was_and_reports(run, tmp_path):
    code, seeds, _ = run("--seed", 3)
    assert (code, seeds) == (0, [3, 4, 5])
    report = (tmp_path / "out" / "report.md").read_text()
    assert "3 pictures of 3 prompts." in report and (tmp_path / "out" / "pictures.png").is_file()
    (tmp_path / "out" / "samples" / "000001.png").unlink()
    assert run("--seed", 3)[:2] == (0, [4])
    code, seeds, said = run("--seed", 3, "--steps", 5)
    assert (code, seeds) == (1, []) and "Other settings" in said
    assert run("--seed", 3, "--steps", 5, "--force")[:2] == (0, [3, 4, 5])


def test_what_decides_pictures_of_this_process_is_written_down():
    def written(*more):
        options = ["p.txt", "--output", "o", "--model", "m.pth", "--t5", "t", "--vae", "v", *more]
        return evaluate.local_maker(evaluate.parse().parse_args(options))[1]

    usual = written()
    others = [
        written(*more) for more in (["--lora", "x.safetensors"], ["--weights", "model"], ["--guidance-reuse", "2"])
    ]
    assert all(other != usual for other in others) and not set(evaluate.RARE) & set(usual)


def test_batches_hold_what_is_missing(run, tmp_path):
    assert run("--per-prompt", 2, "--batch", 4)[:2] == (0, [[0, 1, 2, 3], [4, 5]])
    for number in (1, 2, 5):
        (tmp_path / "out" / "samples" / f"{number:06}.png").unlink()
    assert run("--per-prompt", 2, "--batch", 2)[:2] == (0, [[1, 2], 5])


def test_processes_share_the_pictures(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, seeds, said = run()
    assert (code, seeds) == (0, [1]) and "2 pictures of other processes" in said
    monkeypatch.setenv("RANK", "0")
    assert run()[:2] == (0, [0, 2])
    assert (tmp_path / "out" / "report.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workflow", "x.json"], "Which pictures"),
        (["--per-prompt", "0"], "Numbers out of range"),
        (["--batch", "0"], "Numbers out of range"),
        (["--count", "0"], "Numbers out of range"),
        (["--clip", "/nowhere"], "Not found: got '/nowhere', expected a file or folder. Download a model with 'hf"),
        (["--real", "/nowhere"], "No weights for FID"),
        (["--real", "/nowhere", "--inception", "."], "Not found: got '/nowhere'"),
        (
            ["--real", "/", "--inception", "/no.pth"],
            f"{INCEPTION_URL} to any folder, and name the file with --inception",
        ),
        (["--scorer", "os.path"], "No such scorer"),
    ],
)
def test_bad_input_is_told_before_pictures_are_made(run, arguments, message):
    code, seeds, said = run(*arguments)
    assert (code, seeds) == (1, []) and message in said


def test_a_folder_without_clip_is_told_before_pictures_are_made(run, tmp_path):
    pytest.importorskip("torchmetrics")
    code, seeds, said = run("--clip", tmp_path)
    error = said[said.index("error: ") :]  # behind what PyTorch warns of at an import
    assert (code, seeds) == (1, []) and error.startswith(f"error: Not a CLIP model: got '{tmp_path}' (")
    assert error.count("\n") == 1 and "hf download openai/clip-vit-large-patch14" in error


def test_a_workflow_needs_the_places_of_prompt_and_seed(tmp_path, capsys):
    workflow = tmp_path / "flow.json"
    workflow.write_text(json.dumps({"1": {"class_type": "KSampler", "inputs": {"seed": 0}}}))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox")
    usual = [str(each) for each in (prompts, "--output", tmp_path / "out", "--workflow", workflow)]
    for more, message in (
        ([], "no --prompt-node"),
        (["--prompt-node", "1.seed", "--per-prompt", "2"], "no --seed-node"),
        (["--prompt-node", "2.text"], "No such input: got 2.text"),
    ):
        assert run_command(evaluate.main, evaluate.parse(), [*usual, *more]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def save(folder, count, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        size = (20 + number, 30, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.png")
    return find_pictures(folder)


def test_the_demo_scorer_reads_captions_and_pictures(tmp_path):
    rng, pictures = Random(1), []
    for number in range(6):
        scene = random_scene(rng, 1 + number % 2, 128, 128)
        text = caption(scene)
        read = prompt_scorer.read_caption(text)
        assert caption(read) == text
        Image.fromarray(draw_scene(scene)).save(tmp_path / f"{number}.png")
        pictures.append((tmp_path / f"{number}.png", text))
    scorer = load_scorer("pixart_pack.demo.prompt_scorer:score")
    results = measure(evaluate.Scores(scorer=scorer), pictures)
    assert all(len(values) == 6 and np.mean(values) > 0.9 for values in results.values())
    with pytest.raises(ValueError, match="Caption is not understood: got 'a fox'"):
        scorer(Image.new("RGB", (8, 8)), "a fox")


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Inception of torch-fidelity's own class with random weights, as its users have it: one file."""
    pytest.importorskip("torchmetrics")
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Fresh(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            """Weights stay random."""

    path = tmp_path_factory.mktemp("inception") / INCEPTION
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(Fresh("any", ["2048"], str(path)).state_dict(), path)
    return path


@pytest.mark.slow
def test_the_users_file_is_inceptions_weights(run, inception, tmp_path, monkeypatch):
    save(tmp_path / "real", 2)
    weights = torch.load(inception, weights_only=True)
    loaded = load_fid(inception).inception
    assert torch.equal(loaded.fc.weight, weights["fc.weight"]) and not loaded.use_antialias
    for content in ({}, [], {"fc.weight": torch.zeros(2)}):
        torch.save(content, tmp_path / "other.pth")
        code, seeds, said = run("--real", tmp_path / "real", "--inception", tmp_path / "other.pth")
        assert (code, seeds) == (1, []) and said.startswith("error: Not Inception's weights: got 'other.pth' (")
        assert said.count("\n") == 1 and INCEPTION_URL in said
    for count, real in ((1, "real"), (3, "one")):
        (tmp_path / "one").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "one" / "a.png")
        code, seeds, said = run("--real", tmp_path / real, "--inception", inception, "--count", count)
        assert (code, seeds) == (1, []) and "Too few pictures for FID" in said
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    code, seeds, said = run("--real", tmp_path / "real", "--inception", inception)
    assert (code, seeds) == (1, []) and "torch-fidelity is missing" in said and "pip install" in said


@pytest.mark.slow
def test_fid_and_clip_score_reach_the_report(run, inception, tmp_path):
    save(tmp_path / "real", 4)
    clip = write_clip(tmp_path / "clip")
    code, _, said = run("--real", tmp_path / "real", "--inception", inception, "--clip", clip)
    assert code == 0, said
    means = json.loads((tmp_path / "out" / "scores.json").read_text())["means"]
    assert means["FID"] > 0 and 0 <= means["CLIP score"] <= 100
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"| FID | {means['FID']:.4f} |" in report and "| CLIP score |" in report


class Colours(torch.nn.Module):
    """A stand-in for Inception: the mean colour, the spread and the first pixel."""

    num_features = 9

    def forward(self, pictures):
        pixels = pictures.double().flatten(2)
        return torch.cat([pixels.mean(2), pixels.std(2), pixels[..., 0]], 1)


def test_fid_is_torchmetrics_own_on_pictures_of_any_sizes(tmp_path):
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, made = save(tmp_path / "real", 12), save(tmp_path / "made", 12, seed=1)

    def distance(one, other):
        return frechet_distance(FrechetInceptionDistance(Colours()), one, other)

    assert abs(distance(real, real)) < 1e-3 * distance(real, made)


def test_the_clip_score_is_that_of_a_local_model(tmp_path):
    pytest.importorskip("torchmetrics")
    folder = write_clip(tmp_path / "clip")
    paths = save(tmp_path / "made", 2)
    long = "a fox " * 100
    scores = clip_scores(load_clip(folder), [(paths[0], "a fox"), (paths[1], long)])
    assert scores == [clip_scores(load_clip(folder), [each])[0] for each in ((paths[0], "a fox"), (paths[1], long))]
    assert all(0 <= score <= 100 for score in scores)
    assert abs(scores[0] - cosine(folder, paths[0], "a fox")) < 1e-3


def test_a_clip_of_a_stranger_is_read_without_its_pickles_program(tmp_path):
    pytest.importorskip("torchmetrics")
    folder = write_clip(tmp_path / "clip")
    paths = save(tmp_path / "made", 1)
    expected = clip_scores(load_clip(folder), [(paths[0], "a fox")])
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert clip_scores(load_clip(folder), [(paths[0], "a fox")]) == pytest.approx(expected, abs=1e-4)
    torch.save({"a": Strange()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Not a CLIP model: got .*weights too few") as caught:
        load_clip(folder)
    assert "weights_only" not in str(caught.value)
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="A link leads out of its folder"):
        load_clip(folder)


class Strange:
    """What a pickle of strangers may hold."""


@torch.no_grad()
def cosine(folder, path, prompt):
    """The score by transformers alone."""
    from transformers import CLIPModel, CLIPProcessor

    inputs = CLIPProcessor.from_pretrained(folder)(text=[prompt], images=[Image.open(path)], return_tensors="pt")
    return max(0.0, float(CLIPModel.from_pretrained(folder)(**inputs).logits_per_image) / LOGIT_SCALE * 100)


def write_clip(folder):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder.mkdir()
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(letters), "eos_token_id": len(letters) + 1}
    text = {**sizes, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 77}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    side = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side), tokenizer).save_pretrained(folder)
    return folder
