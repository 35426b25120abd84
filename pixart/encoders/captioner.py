"""Dense captions of pictures by a vision-language model from a local folder: LLaVA, or any other of transformers."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..weights.folders import read_json

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

# Source: PixArt-alpha, tools/VLM_caption_lightning.py: both prompts, the sizes, temperature and number of tokens.
DESCRIBE = "Describe this image in a very detailed manner"
DESCRIBE_CAPTION = 'Given the caption of this image "{}", describe this image in a very detailed manner'
CAPTION_MARK = "{}"
LONG_PX, SHORT_PX = 800, 400
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
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and ("vision_config" in config or "image_token_index" in config)


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
        texts = [self._chat(prompt) for prompt in prompts]
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

    def _chat(self, prompt: str) -> str:
        if not getattr(self.processor, "chat_template", None):
            image = getattr(self.processor, "image_token", None) or "<image>"
            return PLAIN_CHAT.format(image=image, prompt=prompt)
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

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
            f"Captioning model not found: got '{folder}', expected a folder such as llava-1.5-7b-hf. Correct the path."
        )
    try:
        import transformers
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise ImportError(
            f"transformers cannot be used: got '{error}', expected 4.46 or newer for captions. "
            f"Install it with 'pip install -U transformers'."
        ) from error
    precision = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    try:
        kind = read_json(folder / "config.json").get("model_type")
        options = {precision: dtype or "auto"}
        model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, **options)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, AttributeError) as error:
        raise ValueError(
            f"Not a captioning model: got '{folder.name}' ({_first_line(error)}), expected a model that sees pictures, "
            f"with its processor, as transformers saves it. Choose a folder such as llava-1.5-7b-hf."
        ) from error
    if not hasattr(processor, "tokenizer") or not model.can_generate():
        raise ValueError(
            f"Not a captioning model: got '{folder.name}' of the kind {kind}, expected one that sees pictures and "
            f"writes. Choose a folder such as llava-1.5-7b-hf."
        )
    return Captioner(model.to(device).eval().requires_grad_(False), processor)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
