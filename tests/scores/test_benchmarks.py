"""T2I-CompBench and GenEval: phrases, rules, and the models of transformers that see."""

import json
import string
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from pixart_pack.demo import prompt_scorer, scorer
from pixart_pack.demo.scenes import caption, draw_scene, random_scene
from pixart_pack.pixart.commands import evaluate
from pixart_pack.pixart.commands.console import run_command
from pixart_pack.pixart.commands.evaluate import plan, read_prompts
from pixart_pack.pixart.scores.asking import load_vqa
from pixart_pack.pixart.scores.benchmarks import Benchmark
from pixart_pack.pixart.scores.compbench import (
    CompBench,
    Tools,
    category_of,
    describe_reading,
    read_relations,
    score_numbers,
    score_places,
    score_relation,
)
from pixart_pack.pixart.scores.finding import Detector, Found, load_detector
from pixart_pack.pixart.scores.geneval import GenEval, judge, overall, places, read_metadata
from pixart_pack.pixart.scores.phrases import Relation, bare_nouns, find_counts, find_relation, noun_phrases, singular
from pixart_pack.tests.commands.test_evaluate import write_clip

# --- Prompts


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a green bench and a red car", ["a green bench", "a red car"]),
        ("The fluffy cat is sitting on the smooth table", ["The fluffy cat", "the smooth table"]),
        ("a man on the left of a fire hydrant", ["a man", "a fire hydrant"]),
        ("rubber ball and fabric pillow", ["rubber ball", "fabric pillow"]),
        ("four dogs, two fire trucks and a bowl", ["four dogs", "two fire trucks", "a bowl"]),
        ("a bottle of wine; the", ["a bottle", "wine"]),
        ("", []),
    ],
)
def test_prompts_are_cut_into_their_things(prompt, phrases):
    assert noun_phrases(prompt) == phrases


def test_relations_numbers_and_bare_nouns_are_read():
    assert find_relation("a man on the right of a fire hydrant") == ("man", "right", "fire hydrant")
    assert find_relation("The red hat was on top of the coat") == ("red hat", "top", "coat")
    assert find_relation("a dog near a cat") == ("dog", "next to", "cat")
    assert find_relation("a linear dog") is None and find_relation("near a cat") is None
    assert find_counts("four dogs, two fire trucks, an owl and some rain") == {"dog": 4, "fire truck": 2, "owl": 1}
    assert bare_nouns("the fluffy cat is sitting on two smooth tables") == "the cat is sitting on two tables"
    plurals = {"boxes": "box", "cherries": "cherry", "glass": "glass", "people": "person", "knives": "knife"}
    assert {singular(plural) for plural in plurals} == set(plurals.values())


@pytest.mark.parametrize("name", ["color_val.txt", "non_spatial_train.txt", "3d_spatial_val.txt", "complex_val.txt"])
def test_the_category_is_in_the_files_name(name):
    assert name.startswith(category_of(name)) and category_of(f"my_{name}") is None


# --- The rules of T2I-CompBench

LEFT, RIGHT, BELOW = (0, 0, 100, 100), (300, 10, 400, 110), (10, 300, 110, 400)


def test_places_are_scored_as_published():
    def relation(kind, first, second):
        return score_relation(kind, first, second, 512)

    assert relation("left", LEFT, RIGHT) == relation("right", RIGHT, LEFT) == 1
    assert relation("top", LEFT, BELOW) == relation("bottom", BELOW, LEFT) == 1
    assert relation("right", LEFT, RIGHT) == relation("top", LEFT, RIGHT) == relation("left", LEFT, LEFT) == 0
    assert relation("next to", LEFT, RIGHT) == 1 and relation("next to", LEFT, (400, 400, 500, 500)) == 150 / 400
    assert score_relation("next to", LEFT, (400, 400, 500, 500), 1024) == 300 / 400
    overlapping = relation("left", LEFT, (60, 0, 160, 100))
    assert overlapping == pytest.approx(0.1 / (40 / 160))


def test_things_that_are_missing_cost_half_and_uncertain_ones_more():
    both = [Found("cat", 0.8, LEFT), Found("dog", 0.6, RIGHT)]
    on_the_left, on_the_right = Relation("cat", "left", "dog"), Relation("cat", "right", "dog")
    assert score_places(on_the_left, both, 512) == pytest.approx(0.35 + 0.5)
    assert score_places(on_the_right, both, 512) == score_places(on_the_left, both[:1], 512) == 0
    same = Relation("cat", "left", "cat")
    assert score_places(same, both, 512) == 0
    assert score_places(same, [both[0], Found("cat", 0.6, RIGHT)], 512) == pytest.approx(0.85)


def test_numbers_are_scored_as_published():
    found = [Found("dog", 1, LEFT), Found("dog", 1, RIGHT), Found("cat", 1, BELOW)]
    assert score_numbers({"dog": 2, "cat": 1}, found) == 1
    assert score_numbers({"dog": 3, "cat": 1}, found) == 0.75
    assert score_numbers({"dog": 2, "owl": 1}, found) == 0.5
    assert score_numbers({}, found) == 0


def test_complex_prompts_count_what_their_lists_say(tmp_path):
    prompts = tmp_path / "complex_val.txt"
    prompts.write_text("The red hat is on top of the coat.\nA girl waves to the boy.\nA fox.\n")
    with pytest.raises(FileNotFoundError, match="complex_val_spatial.txt"):
        read_relations(prompts)
    (tmp_path / "complex_val_spatial.txt").write_text("the red hat is on top of the coat.\n")
    (tmp_path / "complex_val_action.txt").write_text("A girl waves to the boy\n\n")
    texts = []

    def similarity(picture, text):
        texts.append(text)
        return 0.2

    hat = Found("red hat", 1.0, LEFT)
    tools = Tools(lambda picture, questions: [0.5] * len(questions), Detector(lambda *_: [hat]), similarity)
    score = CompBench("complex", tools, read_relations(prompts))
    picture = Image.new("RGB", (512, 512))
    means = [score(picture, prompt)["3-in-1"] for prompt in read_prompts(prompts)]
    # Two phrases and a place, two phrases and an action, one phrase and both.
    assert means == pytest.approx([(0.25 + 0) / 2, (0.25 + 0.2) / 2, (0.5 + 0 + 0.2) / 3])
    assert texts[0].startswith("The hat is on")


# --- The rules of GenEval


def row(*include, exclude=(), tag="any"):
    return {"tag": tag, "prompt": "a prompt", "include": list(include), "exclude": list(exclude)}


DOG, TWO_DOGS = {"class": "dog", "count": 1}, {"class": "dog", "count": 2}
CAT_LEFT = {"class": "cat", "count": 1, "position": ["left of", 0]}


@pytest.mark.parametrize(
    ("wanted", "right"),
    [
        (row(DOG), True),
        (row(TWO_DOGS), False),
        (row(DOG, exclude=[TWO_DOGS]), True),
        (row(DOG, exclude=[DOG]), False),
        (row({**DOG, "color": "red"}), True),
        (row({**DOG, "color": "blue"}), False),
        (row(DOG, CAT_LEFT), True),
        (row(DOG, {**CAT_LEFT, "position": ["above", 0]}), False),
        (row(TWO_DOGS, CAT_LEFT), False),
    ],
)
def test_metadata_is_judged_as_published(wanted, right):
    found = {"dog": [Found("dog", 0.9, RIGHT)], "cat": [Found("cat", 0.8, LEFT)]}
    assert judge(wanted, found, lambda things, name: ["red"] * len(things)) is right


def test_places_leave_room_for_the_things_sizes():
    assert places(LEFT, RIGHT) == {"left of"} and places(RIGHT, LEFT) == {"right of"}
    assert places(LEFT, BELOW) == {"above"} and places(BELOW, LEFT) == {"below"}
    assert places(LEFT, LEFT) == places(LEFT, (15, 0, 115, 100)) == set()
    assert places(LEFT, (300, 300, 400, 400)) == {"left of", "above"}


def test_the_mean_is_that_of_the_tags():
    nan = float("nan")
    assert overall({"counting": [1.0, 0.0, nan, nan], "colors": [nan, nan, 1.0, 1.0]}) == 0.75


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"tag": "a", "include": []}',
        '{"tag": "a", "prompt": " ", "include": []}',
        '{"tag": "a", "prompt": "b", "include": [{"class": "dog"}]}',
        '{"tag": "a", "prompt": "b", "include": [{"class": "dog", "count": 1, "color": "mauve"}]}',
        '{"tag": "a", "prompt": "b", "include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}',
        "",
    ],
)
def test_other_metadata_is_refused_by_its_line(tmp_path, line):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match="Not GenEval's metadata: got line 2|No prompts"):
        read_metadata(path)


# --- The demo's own scorer, as what sees


def seen(picture):
    """What the demo's scorer finds in a picture: {`red circle`: Found}."""
    pixels = np.asarray(picture)
    found = {}
    for colour, mask in scorer.find_masks(pixels, scorer.find_background(pixels)):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        name = f"{colour} {scorer.classify_shape(mask)}"
        found[name] = Found(name, 1.0, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return found


def ask(picture, questions):
    things = seen(picture)
    return [float(any(question.endswith(f"{name}?") for name in things)) for question in questions]


def find(picture, names, least):
    things = seen(picture)
    return [things[name] for name in names if name in things]


@pytest.mark.slow
def test_both_agree_with_the_demos_own_scorer():
    """Wherever the demo's scorer finds colours and shapes right, so do these, and where it finds them wrong."""
    rng = Random(3)
    attributes, spatial = CompBench("color", Tools(ask)), CompBench("spatial", Tools(detector=Detector(find)))
    decided = 0
    for _ in range(12):
        scene, other = (random_scene(rng, 2, 128, 128) for _ in range(2))
        first, second = (f"{item.colour} {item.shape}" for item in scene.items)
        for drawn in (scene, other):
            picture = Image.fromarray(draw_scene(drawn))
            own = prompt_scorer.score(picture, caption(scene))
            is_right = own["colour"] == own["shape"] == 1.0
            assert attributes(picture, f"a {first} and a {second}")["BLIP-VQA"] == float(is_right and drawn is scene)
        picture = Image.fromarray(draw_scene(scene))
        true = [kind for kind in ("left", "right", "top", "bottom") if _scored(spatial, picture, first, kind, second)]
        turned = [kind for kind in ("left", "right", "top", "bottom") if _scored(spatial, picture, second, kind, first)]
        opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
        assert turned == sorted((opposite[kind] for kind in true), key=list(opposite).index)
        decided += len(true) == 1
        wanted = [{"class": first, "count": 1}, {"class": second, "count": 1}]
        assert GenEval([row(*wanted)], Detector(find), None)(picture, "a prompt") == {"any": 1.0}
    assert decided >= 10


def _scored(spatial, picture, first, kind, second):
    return spatial(picture, f"a {first} on the {kind} of a {second}")["2D spatial"] == 1


# --- The models that see, tiny ones of the real classes


def write_words(folder):
    """BERT's vocabulary of letters, and the words for answers."""
    from transformers import BertTokenizer

    letters = string.ascii_lowercase
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "?"]
    words += [*letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(folder / "vocab.txt")), len(words)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    from transformers import BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    folder = tmp_path_factory.mktemp("blip")
    tokenizer, count = write_words(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"vocab_size": count + 2, "bos_token_id": count, "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}
    text = {**sizes, **special, "projection_dim": 8, "max_position_embeddings": 64, "encoder_hidden_size": 16}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})
    model = BlipForQuestionAnswering(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    side = {"height": 16, "width": 16}
    BlipProcessor(BlipImageProcessor(size=side), tokenizer).save_pretrained(folder)
    return folder


def noise_picture(width=40, height=24, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@torch.no_grad()
def test_answers_are_those_of_the_models_own_generation(blip):
    from transformers import BlipForQuestionAnswering, BlipProcessor

    questions = ["a red car?", "the very long bench?"]
    answers = load_vqa(blip)(noise_picture(), questions)
    model, processor = BlipForQuestionAnswering.from_pretrained(blip).eval(), BlipProcessor.from_pretrained(blip)
    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    for question, answer in zip(questions, answers, strict=True):
        inputs = processor(images=noise_picture(), text=question, return_tensors="pt")
        inputs["input_ids"][:, 0] = model.config.text_config.vocab_size - 1  # [ENC]
        made = model.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        odds = made.logits[0][0].softmax(-1)
        assert answer == pytest.approx(float(odds[yes] / (odds[yes] + odds[no])), abs=1e-5)
    assert answers[0] != answers[1]


@pytest.fixture(scope="module")
def owl(tmp_path_factory):
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    folder = tmp_path_factory.mktemp("owls") / "owl"
    write_clip(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 16}
    torch.manual_seed(0)
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def test_things_of_any_name_are_found_inside_the_picture_each_once(owl):
    detector = load_detector(owl)
    assert not detector.has_masks
    found = detector.find(noise_picture(), ["fox", "red car"], 0.0)
    assert {thing.name for thing in found} <= {"fox", "red car"} and found
    assert [thing.score for thing in found] == sorted((thing.score for thing in found), reverse=True)
    assert detector.find(noise_picture(), ["fox"], 1.0) == []


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("mask2former")
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, out_features=stages
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        id2label={0: "person", 1: "dog"},
        **{"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "num_queries": 5, "num_attention_heads": 2},
        **{"dim_feedforward": 16, "encoder_feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 2},
    )
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}, ignore_index=255).save_pretrained(folder)
    return folder


def test_things_of_fixed_names_have_masks(mask2former):
    detector = load_detector(mask2former)
    found = detector.find(noise_picture(), ["girl", "dog"], 0.0)
    assert detector.has_masks and found and {thing.name for thing in found} <= {"girl", "dog"}
    for thing in found:
        left, top, right, bottom = (int(each) for each in thing.box)
        assert thing.mask.shape == (24, 40) and thing.mask.sum() == thing.mask[top:bottom, left:right].sum() > 0
    with pytest.raises(ValueError, match="Class unknown to the detector: got 'fox', expected one of the 2"):
        detector.find(noise_picture(), ["fox"], 0.0)


def test_other_folders_are_refused_by_what_they_hold(tmp_path, blip):
    for load in (load_vqa, load_detector):
        with pytest.raises(ValueError, match="Not a"):
            load(tmp_path)
    with pytest.raises(ValueError, match="Unknown detector: got model_type 'blip'"):
        load_detector(blip)


# --- The command


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `evaluate` with pictures of noise; gives (exit code, how many were made, what it says)."""
    made = []

    def maker(options):
        def make(tasks):
            made.extend(tasks)
            return [noise_picture(seed=task.seed) for task in tasks]

        return make, {}

    monkeypatch.setattr(evaluate, "local_maker", maker)

    def command(prompts, *arguments):
        made.clear()
        usual = [prompts, "--output", tmp_path / "out", "--model", "x.pth", "--device", "cpu", *arguments]
        code = run_command(evaluate.main, evaluate.parse(), [str(each) for each in usual])
        said = capsys.readouterr()
        return code, len(made), said.out + said.err

    return command


def test_compbench_is_scored_and_goes_on_where_it_was(run, tmp_path, blip, monkeypatch):
    prompts = tmp_path / "color_val.txt"
    prompts.write_text("a green bench and a red car\na blue fox\n")
    assert run(prompts, "--score", "compbench")[:2] == (1, 0)
    code, count, said = run(prompts, "--score", "compbench", "--vqa", blip)
    assert (code, count) == (0, 2), said
    means = json.loads((tmp_path / "out" / "scores.json").read_text())["means"]
    assert 0 < means["BLIP-VQA"] < 1 and "| BLIP-VQA |" in (tmp_path / "out" / "report.md").read_text()
    loads = []
    monkeypatch.setattr(Benchmark, "load", lambda self: loads.append(1))
    assert run(prompts, "--score", "compbench", "--vqa", blip)[0] == 0  # nothing is scored twice
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["means"] == means
    monkeypatch.undo()


def test_the_report_says_what_of_the_prompts_was_not_read(run, tmp_path, owl):
    prompts = tmp_path / "spatial_val.txt"
    prompts.write_text("a fox on the left of an owl\na fox that sleeps\n")
    assert run(prompts, "--score", "compbench", "--detector", owl)[0] == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "- 1 of 2 prompts: no relation, score 0, such as 'a fox that sleeps'." in report
    assert "- detector: 'owl'" in report and "another detector than UniDet" in report
    assert "a rule, in place of spaCy" in describe_reading("texture", ["a fox"])[0]


def test_geneval_is_scored_under_the_names_of_its_script(run, tmp_path, owl):
    prompts = tmp_path / "evaluation_metadata.jsonl"
    rows = [row(DOG, tag="single_object"), row(TWO_DOGS, tag="counting") | {"prompt": "two dogs"}]
    prompts.write_text("\n".join(json.dumps(each) for each in rows))
    assert "No model for geneval: got no --detector" in run(prompts, "--score", "geneval")[2]
    code, count, said = run(prompts, "--score", "geneval", "--detector", owl, "--per-prompt", "2")
    assert (code, count) == (0, 4), said
    means = json.loads((tmp_path / "out" / "scores.json").read_text())["means"]
    assert set(means) == {"single_object", "counting", "GenEval"}
    assert "NaN" not in (tmp_path / "out" / "scores.json").read_text()  # which JSON does not have
    assert json.loads((tmp_path / "out" / "00001" / "metadata.jsonl").read_text()) == rows[1]
    assert (tmp_path / "out" / "00001" / "samples" / "0001.png").is_file()
    assert plan(["a"], tmp_path, 1, 0, "geneval")[0].path == tmp_path / "00000" / "samples" / "0000.png"


def test_colours_are_named_by_clip(tmp_path, owl):
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text(json.dumps(row({**DOG, "color": "red"}, tag="colors")))
    clip = write_clip(tmp_path / "clip")
    score = Benchmark("geneval", prompts, detector=owl, clip=clip).load()
    assert score(noise_picture(), "a prompt") in ({"colors": 0.0}, {"colors": 1.0})
    with pytest.raises(ValueError, match="got no --clip"):
        Benchmark("geneval", prompts, detector=owl).load()


def test_what_is_not_measured_is_refused(run, tmp_path):
    prompts = tmp_path / "3d_spatial_val.txt"
    prompts.write_text("a fox behind an owl\n")
    assert "3D places need a depth map" in run(prompts, "--score", "compbench")[2]
    assert "Not GenEval's prompts" in run(prompts, "--score", "geneval")[2]
    other = tmp_path / "mine.txt"
    other.write_text("a fox\n")
    assert "Category unknown: got 'mine.txt'" in run(other, "--score", "compbench")[2]
    assert "got no --clip" in run(other, "--score", "compbench", "--category", "non_spatial")[2]
