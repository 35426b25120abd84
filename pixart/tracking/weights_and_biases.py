"""Weights & Biases: when it may go online, and a run of it that holds what it is given and nothing of the machine."""

import netrc
import os
from pathlib import Path

from ..quoting import shorten

OFF, OFFLINE, ONLINE = WANDB_MODES = ("off", "offline", "online")
PERMISSION = "PIXART_WANDB"  # the environment variable by which the owner of a machine allows what is sent
# A workflow comes from anybody: neither the console of the server nor its code, folders and hardware are recorded.
_PRIVATE = {
    **{"silent": True, "console": "off", "disable_code": True, "disable_git": True, "disable_job_creation": True},
    **{"save_code": False, "x_save_requirements": False},
    **{"x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True},
    **{"host": "", "username": "", "email": "", "program": "pixart"},
}


def check_tracking(mode: str) -> None:
    """Raises ValueError for an unknown mode, or online without the owner's permission or an account.

    Raises ImportError when the package is missing.
    """
    if mode not in WANDB_MODES:
        raise ValueError(
            f"Unknown mode: got {shorten(mode)}, expected one of {', '.join(WANDB_MODES)}. Choose one of them."
        )
    if mode == OFF:
        return
    try:
        _import_wandb()
    except ImportError as error:
        raise ImportError(
            "wandb is missing: got no such package, expected it for Weights & Biases. Install it with "
            "'pip install wandb', or turn wandb off."
        ) from error
    if mode == ONLINE and not is_allowed_online():
        raise ValueError(
            f"Weights & Biases may not go online here: got no permission of the machine's owner, expected {PERMISSION}="
            "online in the environment of the program. Set it, or choose offline."
        )
    if mode == ONLINE and not has_wandb_account():
        raise ValueError(
            "No account of Weights & Biases: got no key, expected one for online. Run 'wandb login', or choose offline."
        )


def is_allowed_online() -> bool:
    """Whether the owner of this machine allows that runs are sent. No workflow and no settings file can."""
    return os.environ.get(PERMISSION, "").strip().lower() == ONLINE


def has_wandb_account() -> bool:
    """Whether a key is known, so that wandb would not ask for one on a terminal that nobody watches."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return "api.wandb.ai" in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False


def usual_mode() -> str:
    """Online where the owner allows it and has an account, offline elsewhere."""
    return ONLINE if is_allowed_online() and has_wandb_account() else OFFLINE


def describe_mode(mode: str, folder: str) -> str:
    """Where the data go, in a sentence. folder: as the reader is to see it."""
    if mode == ONLINE:
        return f"Weights & Biases: sent to {os.environ.get('WANDB_BASE_URL', 'https://api.wandb.ai')}"
    return f"Weights & Biases: kept in {folder}, nothing is sent; `wandb sync` sends it"


def open_run(folder: Path, mode: str, project: str = "pixart", **options):
    """A run of wandb that is written into `folder`. options: of wandb.init. Raises as `check_tracking`.

    The mode is given in full, since the environment may say otherwise and nothing may be sent that was not asked for.
    """
    check_tracking(mode)
    wandb = _import_wandb()
    known = getattr(wandb.Settings, "model_fields", _PRIVATE)  # an older wandb has fewer settings
    settings = wandb.Settings(mode=mode, **{name: value for name, value in _PRIVATE.items() if name in known})
    return wandb.init(project=project, name=folder.name, dir=str(folder), mode=mode, settings=settings, **options)


def _import_wandb():
    """The package, which would send counts of its use to its makers, also in a run that is offline."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb
