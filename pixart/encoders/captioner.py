"""Dense captions of pictures by a vision-language model from a local folder: LLaVA, or any other of transformers."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files.inside import check_folder
from ..quoting import plain, shorten
from ..weights.folders import indexed_files, read_json
from .chat_templates import render_chats

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

# Source: PixArt-alpha, tools/VLM_caption_lightning.py: both prompts, the sizes, temperature and number of tokens.
DESCRIBE = "Describe this image in a very detailed manner"
DESCRIBE_CAPTION = 'Given the caption of this image "{}", describe this image in a very detailed manner'
CAPTION_MARK = "{}"
LONG_PX, SHORT_PX = 800, 400
# All that transformers is asked with: it neither runs code of a folder nor asks on the terminal, and reads no pickles.
_OFFLINE = {"local_files_only": True, "trust_remote_code": False}
_OWN_ATTENTION = ("eager", "sdpa", "flex_attention", None)  # any other may be code that transformers gets somewhere
# Numbers that decide how much is allocated for one picture or answer: many times what any model needs.
_LARGEST = {
    **dict.fromkeys(("height", "width", "shortest_edge"), 8192),
    **dict.fromkeys(("image_seq_length", "num_additional_image_tokens"), 2**16),
    **{"min_pixels": 2**26, "num_beams": 16, "num_return_sequences": 1},
}
_SIZED = ("config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json")
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>")
PLAIN_CHAT = "USER: {image}\n{prompt} ASSISTANT:"  # LLaVA 1.5's, for processors without a template


@dataclass(frozen=True)
class CaptionSettings:
    """max_tokens: of an answer. temperature: 0 always takes the likeliest token. seed: of what is drawn above 0."""

    max_tokens: int = 1024
    temperature: float = 0.2
    seed: int = 0

    def __post_init__(self):
        if self.max_tokens < 1 or self.temperature < 0:
            raise ValueError(
                f"Caption settings out of range: got {self.max_tokens} tokens and temperature {self.temperature}, "
                f"expected at least 1 and 0. Enter larger numbers."
            )


def is_captioner_folder(folder: Path) -> bool:
    """Whether a folder holds a model of transformers that sees pictures, with its processor."""
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return False
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return "vision_config" in config or "image_token_index" in config


def fill_prompt(prompt: str, caption: str | None) -> str:
    """The prompt with the picture's short caption at its {}; without one, the official prompt that needs none."""
    if CAPTION_MARK not in prompt:
        return prompt
    return prompt.replace(CAPTION_MARK, caption.strip()) if caption and caption.strip() else DESCRIBE


def shrink(picture: "Image.Image") -> "Image.Image":
    """The picture in RGB, no longer than 800 pixels and no shorter side above 400; the ratio is kept."""
    scale = min(1.0, LONG_PX / max(picture.size), SHORT_PX / min(picture.size))
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB") if scale == 1 else picture.convert("RGB").resize(size)


class Captioner:
    """A vision-language model with its processor."""

    def __init__(self, model: torch.nn.Module, processor):
        self.model, self.processor = model, processor
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # answers are written behind their prompts
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.ends = _end_tokens(model, tokenizer)
        self._chats: dict[tuple[str, str], str] = {}

    def __call__(
        self,
        pictures: Sequence["Image.Image"],
        prompts: Sequence[str],
        settings: CaptionSettings | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> list[str]:
        """One caption for each picture, whole and stripped; pictures of any sizes, as many prompts, one batch.

        on_token: called as each token of the batch is written; what it raises ends the work.
        """
        settings = settings or CaptionSettings()
        texts = self._write_chats(prompts)
        begun = texts[0].startswith(self.processor.tokenizer.bos_token or "\0")  # some templates write it themselves
        inputs = self.processor(
            images=[[shrink(picture)] for picture in pictures],
            text=texts,
            padding=True,
            add_special_tokens=not begun,
            return_tensors="pt",
        )
        inputs = {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        drawing = {"temperature": settings.temperature} if settings.temperature else {}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(settings.seed)
            written = self.model.generate(
                **inputs,
                **drawing,
                do_sample=bool(drawing),
                max_new_tokens=settings.max_tokens,
                eos_token_id=self.ends,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                stopping_criteria=[_Watch(on_token)] if on_token else None,
            )
        answers = written[:, inputs["input_ids"].shape[1] :]
        self._warn_of_cut(answers)
        return [text.strip() for text in self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _write_chats(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as the model's chats, by its template where it has one; those of the last call are kept."""
        template = getattr(self.processor, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            image = getattr(self.processor, "image_token", None) or "<image>"
            return [PLAIN_CHAT.format(image=image, prompt=prompt) for prompt in prompts]
        missing = [prompt for prompt in dict.fromkeys(prompts) if (template, prompt) not in self._chats]
        if missing:
            contents = [[{"type": "image"}, {"type": "text", "text": prompt}] for prompt in missing]
            chats = [[{"role": "user", "content": content}] for content in contents]
            texts = render_chats(template, chats, self.processor.tokenizer.special_tokens_map)
            kept = {key: text for key, text in self._chats.items() if key[1] in prompts}
            self._chats = kept | {(template, prompt): text for prompt, text in zip(missing, texts, strict=True)}
        return [self._chats[template, prompt] for prompt in prompts]

    def _warn_of_cut(self, answers: torch.Tensor) -> None:
        ended = torch.isin(answers, answers.new_tensor(self.ends)).any(1)
        if not ended.all():
            log.warning(
                "%d of %d captions end within a sentence, after %d tokens. More tokens would let them end.",
                int((~ended).sum()),
                len(ended),
                answers.shape[1],
            )


class _Watch:
    """A stopping criterion that stops nothing: it calls."""

    def __init__(self, call: Callable[[], None]):
        self._call = call

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        self._call()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _end_tokens(model, tokenizer) -> list[int]:
    """All tokens that end an answer: the model's, the tokenizer's, and the ends of a turn that it knows."""
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    vocabulary = tokenizer.get_vocab()
    ends.update(vocabulary[token] for token in TURN_ENDS if token in vocabulary)
    return sorted(ends - {None})


def load_captioner(folder: str | Path, dtype: torch.dtype | None = None, device="cpu") -> Captioner:
    """The model of a folder, as transformers saved it; nothing is downloaded. dtype: None keeps the folder's.

    Raises FileNotFoundError without the folder, ImportError without transformers, ValueError for another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Captioning model not found: got {shorten(str(folder), 300)}, expected a folder such as llava-1.5-7b-hf. "
            f"Correct the path."
        )
    try:
        import transformers
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise ImportError(
            f"transformers cannot be used: got {shorten(error, 200)}, expected 4.46 or newer for captions. Install it "
            f"with 'pip install -U transformers'."
        ) from error
    check_folder(folder)
    kind = _check_configuration(folder)
    mapped = [file.name for file in sorted(folder.glob("*.json")) if _has_code(file)]
    precision = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    try:
        options = {precision: dtype or "auto", "use_safetensors": True, **_OFFLINE}
        model = AutoModelForImageTextToText.from_pretrained(folder, **options)
        processor = AutoProcessor.from_pretrained(folder, **_OFFLINE)
    except (ValueError, OSError, KeyError, AttributeError, TypeError, RuntimeError, ImportError) as error:
        if mapped:
            got = f"code of its own (auto_map in {mapped[0]}), which is never run,"
            raise _refused(folder, got, "a kind that transformers has") from error
        raise ValueError(
            f"Not a captioning model: got {shorten(folder.name)} ({plain(_first_line(error), 200)}), "
            f"expected a model that sees pictures, with its processor, as transformers saves it. Choose a folder such "
            f"as llava-1.5-7b-hf."
        ) from error
    if not hasattr(processor, "tokenizer") or not model.can_generate():
        raise ValueError(
            f"Not a captioning model: got {shorten(folder.name)} of the kind {kind}, expected one that sees pictures "
            f"and writes. Choose a folder such as llava-1.5-7b-hf."
        )
    return Captioner(model.to(device).eval().requires_grad_(False), processor)


def _check_configuration(folder: Path) -> str:
    """The folder's model_type. Raises ValueError for what would make transformers run code, connect or read pickles."""
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError as error:
        raise _refused(folder, "no config.json", "a model as transformers saves it") from error
    for entry, value in _entries(config):
        if entry.endswith("attn_implementation") and value not in _OWN_ATTENTION:
            raise _refused(folder, f"the attention {shorten(value)} in config.json", "one of transformers' own")
        if entry == "use_pretrained_backbone" and value:
            raise _refused(folder, "a backbone to download in config.json", "all weights in the folder")
        if entry == "transformers_weights":
            raise _refused(folder, "another name of the weights in config.json", "model.safetensors or its index")
    for file in (folder / name for name in _SIZED if (folder / name).is_file()):
        for entry, value in _entries(read_json(file)):
            if isinstance(value, int | float) and value > _LARGEST.get(entry, value):
                raise _refused(folder, f"{entry} {shorten(value)} in {file.name}", f"at most {_LARGEST[entry]}")
    if (folder / "adapter_config.json").is_file():
        raise _refused(folder, "an adapter", "a whole model. Merge the adapter into its model first")
    names = [file.name for file in folder.iterdir()]
    if not any(name.endswith(".safetensors") for name in names) and any(name.endswith(".bin") for name in names):
        raise _refused(folder, "weights in .bin files alone", "safetensors, which hold no program")
    for name in names:
        if name.endswith(".safetensors.index.json"):
            indexed_files(folder / name)
    return str(config.get("model_type"))


def _entries(config: dict) -> Iterator[tuple[str, object]]:
    """All entries of a configuration and of those within it; deeper than any real one it goes on not."""
    level = [config]
    for _ in range(8):
        yield from ((name, value) for each in level for name, value in each.items())
        level = [value for each in level for value in each.values() if isinstance(value, dict)]


def _has_code(file: Path) -> bool:
    try:
        return "auto_map" in read_json(file)
    except (OSError, ValueError):  # a tokenizer's, which may be larger than a configuration
        return False


def _refused(folder: Path, got: str, expected: str) -> ValueError:
    return ValueError(
        f"Not a captioning model: got {got} in {shorten(folder.name)}, expected {expected}. Choose a folder "
        f"such as llava-1.5-7b-hf."
    )


def _first_line(error: Exception) -> str:
    return shorten(Exception((str(error).splitlines() or [""])[0]), 200)
