"""What distinguishes contents and models: hashes for the keys of a cache."""

import hashlib
from collections.abc import Iterable

import torch

DIGEST_BYTES = 20
_SAMPLES = 256  # numbers read of each tensor: enough that any training or merge of it shows


class Digest:
    """A content hash of texts and bytes that come one by one; it depends on where one ends and the next begins."""

    def __init__(self):
        self._state = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def add(self, part: bytes | str) -> None:
        """Take in one more."""
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        self._state.update(len(data).to_bytes(8, "little"))
        self._state.update(data)

    def add_all(self, parts: Iterable[str]) -> None:
        """Take in texts one after the other, all of ASCII; in one go, which is faster."""
        self._state.update(b"".join(len(part).to_bytes(8, "little") + part.encode("ascii") for part in parts))

    def hexdigest(self) -> str:
        """Of all that was added so far."""
        return self._state.hexdigest()


def digest(*parts: bytes | str) -> str:
    """A content hash of texts and bytes, as hexadecimal; it depends on where one part ends and the next begins."""
    state = Digest()
    for part in parts:
        state.add(part)
    return state.hexdigest()


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of a model by the names, shapes, dtypes and evenly spaced numbers of its tensors, in any order."""
    return digest(*sorted(digest(name, *_sample(tensor)) for name, tensor in tensors))


def _sample(tensor: torch.Tensor) -> tuple[str, bytes]:
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLES)].cpu().contiguous()
    return f"{tuple(tensor.shape)} {tensor.dtype}", some.view(torch.uint8).numpy().tobytes()
