"""Whose prompt runs. A host that was started with --multi-user knows who sends one, but nodes do not learn it."""

import contextlib
import sys
from contextvars import ContextVar
from pathlib import Path

import folder_paths
from comfy.cli_args import args

from ....pixart.files.names import fault_of

USERS = "pixart_users"  # below the output folder
_KEY = "pixart_user"  # in a prompt's extra data, as the queue keeps it
_asking: ContextVar[str | None] = ContextVar("pixart_asking", default=None)


def register_users() -> None:
    """Let every prompt carry the user that sent it from now on, where the host knows users."""
    server = running_server()
    if server is None or not args.multi_user:
        return

    async def note(request, handler):
        if request.method == "POST" and request.path.endswith("/prompt"):
            with contextlib.suppress(KeyError):  # a user that the host does not know
                _asking.set(server.user_manager.get_request_user_id(request))
        return await handler(request)

    note.__middleware_version__ = 1  # as aiohttp's decorator marks one
    server.app.middlewares.append(note)
    server.add_on_prompt_handler(_sign)


def _sign(prompt: dict) -> dict:
    """Write the user over whatever a client says of itself."""
    extra = prompt.get("extra_data")
    extra = extra if isinstance(extra, dict) else {}
    return {**prompt, "extra_data": {**extra, _KEY: _asking.get()}}


def current_user() -> str | None:
    """Who sent the prompt that runs. None in a host for one user, and for a prompt of nobody that the host knows."""
    server = running_server()
    if server is None or not args.multi_user:
        return None
    running, _ = server.prompt_queue.get_current_queue_volatile()
    user = running[0][3].get(_KEY) if running else None
    return user if isinstance(user, str) and fault_of(user) is None else None


def own_output(name: str = "") -> str:
    """Where a folder of this name lies below the output folder: of several users each has one of his own."""
    user = current_user()
    return name if user is None else f"{USERS}/{user}/{name}".rstrip("/")


def own_user_folder() -> Path:
    """The host's user folder, and of several users that of the running prompt's."""
    user = current_user()
    own = None if user is None else folder_paths.get_public_user_directory(user)
    return Path(own or folder_paths.get_user_directory())


def running_server():
    """The host's server, None where there is none."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)  # other programs have none
    return getattr(server, "instance", None)
