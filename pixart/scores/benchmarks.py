"""T2I-CompBench and GenEval as `evaluate` asks for them: what they need, and their numbers of all pictures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm

from ..quoting import plain, shorten
from .asking import GET_VQA, load_vqa
from .compbench import (
    MEASURES,
    NEEDS,
    CompBench,
    Tools,
    category_of,
    check_category,
    describe_reading,
    read_relations,
)
from .finding import GET_DETECTOR, load_detector
from .geneval import OVERALL, GenEval, overall, read_metadata
from .kept import KeptScores
from .measures import GET_CLIP, Scorer, clip_chooser, clip_similarity, load_clip, open_picture

BENCHMARKS = ("compbench", "geneval")
KEPT = "scores.jsonl"
_REMEDIES = {"vqa": GET_VQA, "detector": GET_DETECTOR, "clip": GET_CLIP}


@dataclass(frozen=True)
class Benchmark:
    """name: of BENCHMARKS. prompts: its file. category: of T2I-CompBench, else that of the file's name.

    vqa, detector, clip: folders of models.
    """

    name: str
    prompts: Path
    category: str | None = None
    vqa: Path | None = None
    detector: Path | None = None
    clip: Path | None = None
    device: str = "cpu"

    def load(self) -> Scorer:
        """Everything that scores a picture.

        Raises FileNotFoundError and ValueError for what is missing or of another kind, naming the option.
        """
        if self.name == "geneval":
            rows = read_metadata(self.prompts)
            has_colours = any("color" in each for row in rows for each in row.get("include", ()))
            self._require("detector", *(["clip"] if has_colours else []))
            colours = clip_chooser(load_clip(self.clip).to(self.device)) if has_colours else None
            return GenEval(rows, load_detector(self.detector, self.device), colours)
        category = check_category(self.category or category_of(self.prompts.name), self.prompts.name)
        needed = {NEEDS[measure] for measure in MEASURES[category]}
        self._require(*needed)
        relations = read_relations(self.prompts) if category == "complex" else None
        tools = Tools(
            load_vqa(self.vqa, self.device) if "vqa" in needed else None,
            load_detector(self.detector, self.device) if "detector" in needed else None,
            clip_similarity(load_clip(self.clip).to(self.device)) if "clip" in needed else None,
        )
        return CompBench(category, tools, relations)

    def notes(self, prompts: Iterable[str]) -> list[str]:
        """How it is measured, and what of the prompts could not be read, in lines."""
        folders = {option: getattr(self, option) for option in _REMEDIES}
        models = [f"{option}: {plain(shorten(folder.name))}" for option, folder in folders.items() if folder]
        if self.name == "geneval":
            return models
        category = check_category(self.category or category_of(self.prompts.name), self.prompts.name)
        return [*models, *describe_reading(category, dict.fromkeys(prompts))]

    def _require(self, *options: str) -> None:
        for option in sorted(options):
            folder = getattr(self, option)
            if folder is None:
                raise ValueError(f"No model for {self.name}: got no --{option}, expected a folder. {_REMEDIES[option]}")
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"Not found: got {shorten(str(folder), 300)}, expected a folder. {_REMEDIES[option]}"
                )

    def measure(self, pictures: Sequence[tuple[Path, str]], output: Path) -> dict[str, list[float] | float]:
        """As `measures.measure`. Scores that are made already are taken from the file KEPT in `output`."""
        kept, scorer = KeptScores(output / KEPT, self._settings()), None
        for path, prompt in tqdm(pictures, unit="score"):
            if kept.get(path) is None:
                scorer = scorer or self.load()
                kept.add(path, scorer(open_picture(path), prompt))
        rows = [kept.get(path) for path, _ in pictures]
        names = dict.fromkeys(name for row in rows for name in row)
        results = {name: [row.get(name, float("nan")) for row in rows] for name in names}
        return results | ({OVERALL: overall(results)} if self.name == "geneval" else {})

    def _settings(self) -> dict:
        """What decides the scores: the folders, the age of their weights, and the prompts' file."""
        folders = [getattr(self, option) for option in _REMEDIES]
        weights = [sorted(folder.glob("*.safetensors")) if folder else [] for folder in folders]
        return {
            "benchmark": self.name,
            "category": self.category,
            "models": [str(folder) for folder in folders],
            "weights": [[file.stat().st_mtime_ns for file in files] for files in weights],
            "prompts": sha256(self.prompts.read_bytes()).hexdigest(),
        }
