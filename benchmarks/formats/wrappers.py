"""PixArt transformers inside what training programs save around them."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch

from . import Found, Row
from .transformers import base, measure

EXACT = 1.0 - 1e-6  # of the cosine: nothing is quantised


def _plain() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base().state_dict().items()}


def _measure(path: Path) -> Found:
    return measure(path, _plain())


def _saved(wrap: Callable[[torch.nn.Module], object]) -> Callable[[Path], Path]:
    """Writes what a program makes of the model by torch.save."""

    def make(folder: Path) -> Path:
        torch.save(wrap(copy.deepcopy(base())), folder / "model.pt")
        return folder / "model.pt"

    return make


def _averaged_by_torch(model):
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    return averaged.state_dict()


def _averaged_by_ema_pytorch(model):
    from ema_pytorch import EMA

    return EMA(model, beta=0.5).state_dict()


def _averaged_by_diffusers(model):
    from diffusers.training_utils import EMAModel

    return {"model": model.state_dict(), "ema": EMAModel(model.parameters()).state_dict()}


def _fused(model):
    model.fuse_qkv_projections()
    return model.state_dict()


def _lightning(model):
    networks = torch.nn.ModuleDict({"transformer": model, "text_encoder": torch.nn.Linear(3, 3)})
    return {"state_dict": networks.state_dict(), "optimizer_states": [], "epoch": 1}


def _distributed(folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": _plain(), "step": 3}, checkpoint_id=folder / "checkpoint", no_dist=True)
    return folder / "checkpoint"


def _folder(folder: Path) -> Path:
    base().save_pretrained(folder / "transformer")
    return folder


def _file_of_folder(folder: Path) -> Path:
    return next((_folder(folder) / "transformer").glob("*.safetensors"))


def _row(form: str, package: str, make: Callable[[Path], Path], **more) -> Row:
    return Row("transformer", form, package, make, _measure, **{"least_cosine": EXACT, **more})


ROWS = [
    _row("generator beside a critic (DMD)", "torch", _saved(lambda m: {"generator": m.state_dict(), "critic": {}})),
    _row("params_ema", "torch", _saved(lambda m: {"params_ema": m.state_dict()})),
    _row("AveragedModel", "torch", _saved(_averaged_by_torch)),
    _row("EMA", "ema-pytorch", _saved(_averaged_by_ema_pytorch)),
    _row("EMAModel, a list without names", "diffusers", _saved(_averaged_by_diffusers)),
    _row("fused projections", "diffusers", _saved(_fused)),
    _row("one network of several (Lightning)", "torch", _saved(_lightning)),
    _row("distributed checkpoint", "torch", _distributed),
    _row("folder", "diffusers", _folder),
    _row("a file of a folder, its config.json beside it", "diffusers", _file_of_folder),
    _row("a whole pickled module", "torch", _saved(lambda model: model), refused=True),
]
