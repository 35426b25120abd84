"""What loggers share: whether this machine has an account of Weights & Biases."""

import netrc
import os


def has_wandb_account() -> bool:
    """Whether a key or a mode is set, so that wandb would not ask for one on a terminal that nobody watches."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE"):
        return True
    try:
        return "api.wandb.ai" in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
