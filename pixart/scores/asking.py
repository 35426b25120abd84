"""Questions about a picture, answered with a probability, by BLIP as transformers has it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from .local import LOAD_ERRORS, load_model, load_processor, refusal

GET_VQA = (
    "Download a model with 'hf download Salesforce/blip-vqa-base --local-dir blip-vqa-base', and name its folder with "
    "--vqa."
)
QUESTION_TOKENS = 35  # as many as T2I-CompBench reads

# (picture, questions) -> the probability of "yes" against "no" for each.
Asker = Callable[[Image.Image, Sequence[str]], list[float]]


def load_vqa(folder: Path, device: str = "cpu") -> Asker:
    """BLIP for questions, of a folder. Raises ValueError for a folder of another kind.

    As T2I-CompBench asks: the decoder's first word, "yes" over "yes" and "no". Source: its BLIP_VQA.vqa_prob.
    """
    from transformers import BlipConfig, BlipForQuestionAnswering, BlipProcessor

    try:
        model = load_model(folder, BlipForQuestionAnswering, BlipConfig).to(device)
        processor = load_processor(folder, BlipProcessor)
        text = model.config.text_config
        (yes,), (no,) = (processor.tokenizer(word, add_special_tokens=False).input_ids for word in ("yes", "no"))
        if max(yes, no) >= text.vocab_size:
            raise ValueError(f"a vocabulary of {text.vocab_size} words, and a tokenizer of more")
    except LOAD_ERRORS as error:
        raise refusal("a BLIP for questions", folder, error, GET_VQA) from error
    start = model.decoder_start_token_id
    # BLIP's own tokenizer begins questions with [ENC], the word behind the answers' [DEC]; transformers' leaves [CLS].
    encode = start + 1 if start + 1 < text.vocab_size else None

    @torch.inference_mode()
    def ask(picture: Image.Image, questions: Sequence[str]) -> list[float]:
        pixels = processor.image_processor(images=picture, return_tensors="pt")["pixel_values"].to(device)
        states = model.vision_model(pixel_values=pixels)[0]
        return [answer(states, question) for question in questions]

    def answer(states: torch.Tensor, question: str) -> float:
        inputs = processor.tokenizer(question, return_tensors="pt", truncation=True, max_length=QUESTION_TOKENS)
        words = inputs["input_ids"].to(device)
        if encode is not None:
            words[:, 0] = encode
        read = model.text_encoder(input_ids=words, encoder_hidden_states=states, return_dict=False)[0]
        first = torch.full((1, 1), start, device=device)
        logits = model.text_decoder(input_ids=first, encoder_hidden_states=read).logits[0, 0]
        return float(torch.softmax(logits[[yes, no]].float(), 0)[0])

    return ask
