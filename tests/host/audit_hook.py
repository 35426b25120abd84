"""Runs first in a watched ComfyUI: writes down every connection and look-up that leaves this machine."""

import ipaddress
import os
import socket
import sys
import traceback
from pathlib import Path

LOG = Path(__file__).with_name("connections.log")
_OWN_NAMES = {None, "", b"", "localhost", b"localhost", socket.gethostname()}
_EVENTS = {"socket.connect": 1, "socket.sendto": 1, "socket.getaddrinfo": 0, "socket.gethostbyname": 0}


def leaves_the_machine(address) -> bool:
    """address: what a socket is connected to (a tuple, or a path of a Unix socket), or a name that is looked up."""
    if isinstance(address, tuple):
        address = address[0]
    elif isinstance(address, str) and address.startswith(("/", "\0")):
        return False
    if address in _OWN_NAMES:
        return False
    try:
        ip = ipaddress.ip_address(address.decode() if isinstance(address, bytes) else address)
    except ValueError:
        return True
    return not (ip.is_loopback or ip.is_unspecified)


def watch(event: str, arguments: tuple) -> None:
    if event in _EVENTS and leaves_the_machine(arguments[_EVENTS[event]]):
        place = " < ".join(
            f"{Path(each.filename).name}:{each.lineno}" for each in traceback.extract_stack()[-8:-1][::-1]
        )
        line = f"{event} {arguments[_EVENTS[event]]!r} from {place}\n"
        file = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(file, line.encode())
        os.close(file)


if not __name__.startswith("pixart_pack"):
    LOG.touch()  # it is on watch
    sys.addaudithook(watch)
