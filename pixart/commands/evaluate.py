"""Evaluate a model: a picture for every prompt of a file, scores, and a report with pictures.

    python -m pixart evaluate captions_val2014.json --count 30000 --output coco/ --model PixArt-XL-2-1024-MS/ \\
        --real val2014/ --inception weights-inception.pth --clip clip-vit-large-patch14/
    python -m pixart evaluate color_val.txt --output color/ --per-prompt 10 --compbench \\
        --workflow workflow_api.json --prompt-node 6.text --seed-node 3.seed
    python -m pixart evaluate color_val.txt --output color/ --per-prompt 10 --model PixArt-XL-2-1024-MS/ \\
        --score compbench --vqa blip-vqa-base/
    python -m pixart evaluate evaluation_metadata.jsonl --output geneval/ --per-prompt 4 --model PixArt-XL-2-1024-MS/ \\
        --score geneval --detector mask2former/ --clip clip-vit-large-patch14/

Prompt files: one prompt on each line (T2I-CompBench's too), COCO's captions, a JSON list of texts or of objects with
`prompt`, or GenEval's metadata. Pictures come from a running ComfyUI with --workflow (in API format), or from this
process with --model. Run it again to go on; pictures and scores that are there are not made again. Without ComfyUI,
--batch makes several at a time; a picture depends on its seed, whatever the batch. With `torchrun` or `accelerate
launch` each process makes its share, and the first one scores when all are there; with RANK and WORLD_SIZE alone, set
by hand, the one that finishes last.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image

from ..files.atomic import write_atomically
from ..files.documents import TABLE_LIMIT, load_json
from ..quoting import shorten
from ..scores.benchmarks import BENCHMARKS, Benchmark
from ..scores.compbench import MEASURES
from ..scores.geneval import read_metadata
from ..scores.measures import INCEPTION, Scores, load_scorer, measure
from ..scores.report import write_report
from .compare import fill, make_cell, parse_target, read_workflow
from .console import make_parser, own_device
from .sample import add_models, add_settings, load_pipeline, picture_size, read_reuse, read_settings, to_pictures
from .server import ComfyServer
from .team import Team

SETTINGS = "settings.json"
RARE = ("guidance_reuse", "lora", "weights")  # decide the pictures too, where they are not as usual
NAME_LIMIT = 200  # of a prompt in a file's name; file systems take 255 bytes


@dataclass(frozen=True)
class Task:
    """A picture to make. prompt_index: counts the file's prompts."""

    prompt_index: int
    prompt: str
    seed: int
    path: Path


Maker = Callable[[Sequence[Task]], list[Image.Image]]


def read_prompts(path: Path, count: int | None = None) -> list[str]:
    """The prompts of a file, of COCO the first caption of each picture; `count` at most.

    Raises FileNotFoundError, and ValueError for a file without prompts.
    """
    if path.suffix.lower() == ".jsonl":
        prompts = [row["prompt"] for row in read_metadata(path)]
    elif path.suffix.lower() == ".json":
        try:
            prompts = _json_prompts(load_json(path, TABLE_LIMIT))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Prompts cannot be read: got {type(error).__name__} ({shorten(error)}) in {shorten(path.name)}, "
                f"expected COCO's captions or a list of texts. Choose another file."
            ) from error
    else:
        # T2I-CompBench's newer files have more columns behind a tab.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        prompts = [line.split("\t")[0] for line in lines]
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(
            f"No prompts: got an empty {shorten(path.name)}, expected one on each line. Choose another file."
        )
    return prompts[:count]


def _json_prompts(content) -> list[str]:
    if isinstance(content, dict):
        firsts: dict[int, str] = {}
        for each in sorted(content["annotations"], key=lambda each: (each["image_id"], each["id"])):
            firsts.setdefault(each["image_id"], each["caption"])
        return list(firsts.values())
    return [each if isinstance(each, str) else each["prompt"] for each in content]


def plan(prompts: Sequence[str], folder: Path, per_prompt: int, seed: int, names: str = "numbers") -> list[Task]:
    """All pictures, each with a seed of its own.

    names: "numbers", or "compbench" or "geneval" for those that their scripts look for.
    """
    tasks = []
    for index, prompt in enumerate(prompts):
        for number in range(per_prompt):
            count = index * per_prompt + number
            path = {
                "numbers": f"samples/{count:06}",
                "compbench": f"samples/{prompt.replace('/', ' ')[:NAME_LIMIT]}_{count:06}",
                "geneval": f"{index:05}/samples/{number:04}",
            }[names]
            tasks.append(Task(index, prompt, seed + count, folder / f"{path}.png"))
    return tasks


def remote_maker(options: argparse.Namespace) -> tuple[Maker, dict]:
    """(what makes pictures on a running ComfyUI, the settings that decide it). Raises ValueError for wrong nodes."""
    if not options.prompt_node:
        raise ValueError("No place for the prompt: got no --prompt-node, expected one such as 6.text. Add it.")
    if options.per_prompt > 1 and not options.seed_node:
        raise ValueError("No place for the seed: got no --seed-node, expected one such as 3.seed. Add it.")
    workflow = read_workflow(options.workflow)
    places = [parse_target(f"{place}=0", workflow)[:2] for place in (options.prompt_node, options.seed_node) if place]
    server = ComfyServer(options.server)

    def make(task: Task) -> Image.Image:
        filled = fill(workflow, places, (task.prompt, task.seed)[: len(places)])
        return make_cell(server, filled, None, options.timeout_s)

    return lambda tasks: [make(task) for task in tasks], {
        "workflow": fill(workflow, places, (None, None)[: len(places)])
    }


def local_maker(options: argparse.Namespace) -> tuple[Maker, dict]:
    """(what makes pictures in this process, the settings that decide it); models are loaded at the first picture."""
    settings, reuse, loaded = read_settings(options), read_reuse(options), []

    def make(tasks: Sequence[Task]) -> list[Image.Image]:
        if not loaded:
            loaded.append(load_pipeline(options))
        pipeline = loaded[0]
        base_px = pipeline.model.config.base_px
        height, width = picture_size(options.size or f"{base_px}x{base_px}", None)
        prompts, seeds = [task.prompt for task in tasks], [task.seed for task in tasks]
        return to_pictures(pipeline.generate(prompts, options.negative, height, width, seeds, settings, reuse=reuse))

    names = ["model", "t5", "vae", "variant", "dtype", "size", "negative"]
    usual = parse().parse_args(["", "--output", ""])
    names += [name for name in RARE if getattr(options, name) != getattr(usual, name)]
    return make, {**asdict(settings), **{name: str(getattr(options, name)) for name in names}}


def check_settings(folder: Path, settings: dict, force: bool) -> None:
    """Write down what decides the pictures. Raises ValueError when the folder's pictures were made otherwise."""
    path = folder / SETTINGS
    text = json.dumps(settings, indent=1, sort_keys=True)
    if path.is_file() and path.read_text(encoding="utf-8") != text and not force:
        raise ValueError(
            f"Other settings: got a folder {shorten(str(folder), 300)} with pictures of another prompt file, model or "
            f"setting, expected those of now. Choose another --output, or make all again with --force."
        )
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def share_out(tasks: Sequence[Task], team: Team, batch_size: int, force: bool) -> list[Task]:
    """This process's pictures of those that are not there; with force of all.

    Whole batches, such as a single process would make, so that its pictures are the same to the bit.
    """
    missing = [force or not task.path.is_file() for task in tasks]
    if team.is_connected or team.count == 1:
        tasks = list(itertools.compress(tasks, team.agree(missing)))
    # Processes that cannot ask one another start at any time, and have to share the same tasks.
    batches = team.share([tasks[start : start + batch_size] for start in range(0, len(tasks), batch_size)])
    return [task for batch in batches for task in batch if force or not task.path.is_file()]


def make_pictures(missing: Sequence[Task], make: Maker, batch_size: int, is_shown: bool) -> None:
    """Make the pictures, batch by batch."""
    from tqdm import tqdm

    with tqdm(total=len(missing), unit="picture", disable=not is_shown) as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            for task, picture in zip(batch, make(batch), strict=True):
                write_atomically(task.path, lambda file, picture=picture: picture.convert("RGB").save(file, "PNG"))
            bar.update(len(batch))


def read_benchmark(options: argparse.Namespace) -> Benchmark | None:
    """The benchmark that is asked for. Raises ValueError for prompts in another format than its own."""
    if options.score == "geneval" and options.prompts.suffix.lower() != ".jsonl":
        raise ValueError(
            f"Not GenEval's prompts: got {shorten(options.prompts.name)}, expected its evaluation_metadata.jsonl. Name "
            f"that file."
        )
    models = (options.vqa, options.detector, options.clip)
    return (
        Benchmark(options.score, options.prompts, options.category, *models, options.device) if options.score else None
    )


def write_metadata(prompts: Path, tasks: Sequence[Task]) -> None:
    """Write each prompt's metadata where GenEval's script looks for it."""
    rows = read_metadata(prompts)
    for folder, index in {task.path.parent.parent: task.prompt_index for task in tasks}.items():
        text = json.dumps(rows[index], ensure_ascii=False)
        write_atomically(folder / "metadata.jsonl", lambda file, text=text: file.write_text(text, encoding="utf-8"))


def main(options: argparse.Namespace) -> None:
    """Makes this process's pictures; scores when all are there."""
    if min(options.per_prompt, options.batch, 1 if options.count is None else options.count) < 1:
        raise ValueError("Numbers out of range: got --per-prompt, --batch or --count below 1, expected 1 or more.")
    if bool(options.workflow) == bool(options.model):
        raise ValueError("Which pictures: got both or none, expected one of --workflow and --model. Name one.")
    options.device = own_device(options.device)
    with Team() as team:
        evaluate(options, team)


def evaluate(options: argparse.Namespace, team: Team) -> None:
    """What the command does in each process of a team."""
    scorer = team.leads or not team.is_connected  # what is missing for scores is said before the pictures are made
    scores = Scores(options.real, options.inception, options.clip, load_scorer(options.scorer), options.device)
    benchmark = read_benchmark(options)
    prompts = read_prompts(options.prompts, options.count)
    names = "geneval" if options.score == "geneval" else "compbench" if options.compbench else "numbers"
    tasks = plan(prompts, options.output, options.per_prompt, options.seed, names)
    if scorer:
        scores.check(len(tasks))
        if benchmark:
            benchmark.load()
    make, settings = (remote_maker if options.workflow else local_maker)(options)
    digest = sha256("\n".join(prompts).encode()).hexdigest()
    settings |= {"prompts": digest, "seed": options.seed, "per_prompt": options.per_prompt}
    if scorer:
        check_settings(options.output, settings, options.force)
        if names == "geneval":
            write_metadata(options.prompts, tasks)
    # Through a server one by one: each is kept as soon as it is made.
    batch_size = 1 if options.workflow else options.batch
    make_pictures(share_out(tasks, team, batch_size, options.force), make, batch_size, team.leads)
    team.wait()
    missing = sum(not task.path.is_file() for task in tasks)
    if missing:
        sys.stderr.write(f"{missing} pictures of other processes are not there yet; run it again to score.\n")
    elif scorer:
        pictures = [(task.path, task.prompt) for task in tasks]
        results = measure(scores, pictures) | (benchmark.measure(pictures, options.output) if benchmark else {})
        notes = benchmark.notes(prompts) if benchmark else []
        report = write_report(options.output, options.prompts.name, settings, pictures, results, notes)
        sys.stdout.write(f"{report}\n")


def parse() -> argparse.ArgumentParser:
    parser = make_parser("evaluate", __doc__)
    add = parser.add_argument
    add("prompts", type=Path)
    add("--output", type=Path, required=True, help="folder for the pictures, scores and report")
    add("--count", type=int, help="only the first so many prompts")
    add("--per-prompt", type=int, default=1, help="pictures of each; default: %(default)s")
    add("--compbench", action="store_true", help="name pictures as T2I-CompBench's scripts expect them")
    add("--force", action="store_true", help="make all pictures again")
    remote = parser.add_argument_group("a running ComfyUI")
    remote.add_argument("--workflow", type=Path, help="in API format")
    remote.add_argument("--prompt-node", metavar="NODE.INPUT")
    remote.add_argument("--seed-node", metavar="NODE.INPUT", help="each picture has a seed of its own")
    remote.add_argument("--server", default="http://127.0.0.1:8188", help="default: %(default)s")
    remote.add_argument("--timeout-s", type=float, default=3600, help="for one picture; default: %(default)s")
    add_models(parser, required=False)
    add_settings(parser)
    add("--negative", default="", help="what to avoid, without ComfyUI")
    add("--batch", type=int, default=1, help="pictures at a time, without ComfyUI; default: %(default)s")
    add("--size", help="WIDTHxHEIGHT in pixels, without ComfyUI; default: the trained size")
    scores = parser.add_argument_group("scores")
    scores.add_argument("--real", type=Path, help="folder of real pictures, for FID")
    scores.add_argument("--inception", type=Path, help=f"torch-fidelity's {INCEPTION}")
    scores.add_argument("--clip", type=Path, help="folder of a CLIP model, for the CLIP score")
    scores.add_argument("--score", choices=BENCHMARKS, help="a benchmark's own score, of the pictures of its prompts")
    scores.add_argument(
        "--category", choices=list(MEASURES), help="of T2I-CompBench; default: by the prompt file's name"
    )
    scores.add_argument("--vqa", type=Path, help="folder of a BLIP for questions, for T2I-CompBench's attributes")
    scores.add_argument(
        "--detector", type=Path, help="folder of OWL-ViT, OWLv2 or Mask2Former, for places, numbers and GenEval"
    )
    scores.add_argument(
        "--scorer", metavar="MODULE:FUNCTION", help="(picture, prompt) -> {name: number}, for scores of your own"
    )
    return parser
