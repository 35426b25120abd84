"""All workflows: their functions by short names, which are those of the files for the API, and their titles.

A title with its number is the name of the editor's file: the template browser shows it, and sorts by it.
"""

from .apps import APPS
from .control import CONTROL
from .pictures import PICTURES
from .training import TRAINING

WORKFLOWS = {**PICTURES, **CONTROL, **TRAINING, **APPS}

# From the simple ones to the special ones; an app stands behind the graph that it is made of.
_TITLES = {
    "demo": "Demo, nothing to download",
    "demo_app": "Demo as an app",
    "text_to_image_1024": "Text to image, 1024 px",
    "text_to_image_app": "Text to image as an app",
    "text_to_image_512": "Text to image, 512 px",
    "text_to_image_256": "Text to image, 256 px",
    "any_aspect_ratio": "Any aspect ratio",
    "image_to_image": "Image to image",
    "image_to_image_app": "Image to image as an app",
    "inpaint": "Inpaint a part of a picture",
    "hires_fix": "Large pictures in two passes",
    "styles": "Styles",
    "styles_app": "Styles as an app",
    "negative_prompts": "Negative prompt and weights",
    "sigma_300_tokens": "Long captions, 300 tokens",
    "batch_of_prompts": "Several prompts at once",
    "lora": "Use a LoRA",
    "controlnet_hed": "ControlNet, edges of a picture",
    "two_controlnets": "Two ControlNets",
    "lcm_4_steps": "LCM, 4 steps",
    "dmd_1_step": "DMD, 1 step",
    "sa_solver_25": "SA-Solver, 25 steps",
    "compare_settings": "Compare settings",
    "low_memory": "Little graphics memory",
    "save_prompt_embeddings": "Prompts in files, save",
    "load_prompt_embeddings": "Prompts in files, use without T5",
    "dataset_to_features": "Encode a dataset",
    "lora_training": "Train a LoRA",
    "lora_training_app": "Train a LoRA as an app",
    "dreambooth": "Train on one subject, DreamBooth",
    "lcm_distillation": "Distil to 4 steps, LCM",
    "controlnet_training": "Train a ControlNet",
    "convert_a_checkpoint": "Convert a checkpoint",
}
TITLES = {name: f"{number:02} {title}" for number, (name, title) in enumerate(_TITLES.items(), 1)}
