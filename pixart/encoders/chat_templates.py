"""Chat templates of strangers, rendered in a process that is stopped when it takes too long or grows too large."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..quoting import shorten

SECONDS = 10.0  # a template takes thousandths; the rest is for Python to start on a machine with much to do
_PROGRAM = Path(__file__).with_name("chat_process.py")


def render_chats(template: str, chats: Sequence[list[dict]], tokens: dict[str, str]) -> list[str]:
    """The texts of several chats, each a list of messages, up to where the model answers.

    tokens: the special tokens that a template may name, such as bos_token.
    Raises ValueError in words for a template that fails, takes more than SECONDS or writes too much.
    """
    request = json.dumps({"template": template, "chats": list(chats), "tokens": tokens})
    try:
        done = subprocess.run(
            [sys.executable, "-X", "utf8", str(_PROGRAM)],
            input=request.encode(),
            capture_output=True,
            timeout=SECONDS,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise _failed(f"more than {SECONDS:g} seconds") from error
    except ValueError as error:  # it was ended for its memory, or by the system
        raise _failed(f"no answer (code {done.returncode})") from error
    if "error" in answer:
        raise _failed(shorten(Exception(answer["error"]), 200))
    return answer["texts"]


def _failed(got: str) -> ValueError:
    return ValueError(
        f"Chat template cannot be used: got {got} from the captioning model's template, expected the prompt as a "
        f"chat. Choose a model whose template works."
    )
