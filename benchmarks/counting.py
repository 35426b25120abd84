"""Counts what a GPU would do, without one: operations on tensors that have a device, a type and a shape alone."""

from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..pixart.layers import split_heads

# Give memory, and launch nothing.
IDLE = frozenset(["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"])
# Bring numbers to another place or type, and change none.
COPIES = frozenset(
    ["_to_copy", "to", "copy_", "clone", "contiguous", "cat", "stack", "repeat", "constant_pad_nd", "pad", "reshape"]
    + ["flatten", "unflatten", "expand_as", "index_select", "float", "type_as"]
)
DEVICE = "cuda"


class Counts(NamedTuple):
    """kernels: launched. bytes: of memory that they touch, of every tensor once, also where one is read and written.
    casts, copies: of the kernels, those that only bring numbers into another type, or to another place.
    peak: bytes alive at once of what came into being meanwhile.
    """

    kernels: int
    bytes: int
    casts: int
    copies: int
    peak: int


class Counter(TorchDispatchMode):
    """Counts under a FakeTensorMode: `with Counter() as counter: ...; counter.counts()`. names: by operation.

    device: "meta" needs no FakeTensorMode, and knows a backward pass, too.
    """

    def __init__(self, device: str = DEVICE):
        super().__init__()
        self.device = device
        self.names: dict[str, int] = {}
        self._bytes = self._casts = self._copies = self._peak = 0
        self._known: dict[int, StorageWeakRef] = {}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._attention = _Attention(self)

    def __enter__(self):
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._attention.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = self._here((args, kwargs))
        for tensor in given:
            self._meet(tensor)
        result = function(*args, **kwargs)
        self.note(function.overloadpacket.__name__, given, self._here(result), function._schema.is_mutable)
        return result

    def note(self, name, given, results, writes=False):
        """One operation of this name on tensors, which gave others. writes: into some that were given."""
        before = {_place(tensor) for tensor in given}
        fresh = [tensor for tensor in results if _place(tensor) not in before]
        alive = self._purge()
        for tensor in fresh:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._alive and (key not in self._known or self._known[key].expired()):
                self._alive[key] = (StorageWeakRef(storage), storage.nbytes())
                alive += storage.nbytes()
        self._peak = max(self._peak, alive)
        if name in IDLE or not (fresh or writes):
            return
        self.names[name] = self.names.get(name, 0) + 1
        self._bytes += sum(map(_extent, given)) + sum(map(_extent, fresh))
        source = given[-1] if name == "copy_" else given[0] if given else None
        if name in COPIES and source is not None:
            is_cast = source.dtype != results[0].dtype
            self._casts, self._copies = self._casts + is_cast, self._copies + (not is_cast)

    def counts(self) -> Counts:
        """What was counted so far."""
        return Counts(sum(self.names.values()), self._bytes, self._casts, self._copies, self._peak)

    def attend(self, q, k, v, num_heads, mask=None):
        """As `layers.attend`, counted in a backward pass as well, where Python's modes do not reach."""
        q, k, v = (split_heads(tensor, num_heads) for tensor in (q, k, v))
        return _Attended.apply(q, k, v, mask, self).transpose(1, 2).flatten(2)

    def _here(self, tree):
        return [
            leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device.type == self.device
        ]

    def _meet(self, tensor):
        """A tensor that was there before, such as a weight, is not counted among what came into being."""
        key = tensor.untyped_storage()._cdata
        if key not in self._alive or self._alive[key][0].expired():
            self._known[key] = StorageWeakRef(tensor.untyped_storage())

    def _purge(self):
        gone = [key for key, (storage, _) in self._alive.items() if storage.expired()]
        for key in gone:
            del self._alive[key]
        return sum(size for _, size in self._alive.values())


class _Attention(TorchFunctionMode):
    """Counts an attention as the one kernel that it is on a GPU, which PyTorch cannot choose where there is none."""

    def __init__(self, counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        q, k, v, *rest = args
        return _Attended.apply(q, k, v, kwargs.get("attn_mask", rest[0] if rest else None), self.counter)


class _Attended(torch.autograd.Function):
    """One kernel in either direction, which keeps what it reads, what it gives, and a number of each query."""

    @staticmethod
    def forward(ctx, q, k, v, mask, counter):
        batch, heads, length, _ = q.shape
        given = [q, k, v] if mask is None else [q, k, v, mask]
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)  # laid out as flash attention gives it
        counter.note("scaled_dot_product_attention", given, [out], writes=True)
        if q.requires_grad or k.requires_grad or v.requires_grad:
            sums = q.new_empty(batch, heads, length, dtype=torch.float32)
            ctx.save_for_backward(*given, out, sums)
            ctx.counter = counter
        return out

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, *rest = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in (q, k, v)]
        ctx.counter.note("scaled_dot_product_attention_backward", [q, k, v, *rest, gradient], gradients, writes=True)
        return (*gradients, None, None)


def _place(tensor):
    return tensor.untyped_storage()._cdata


def _extent(tensor):
    """Bytes of memory behind a tensor: what `expand` repeats is read once."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride else 1
    return numbers * tensor.itemsize


def fake(shape, dtype=torch.float32):
    """A tensor on the GPU that is not there."""
    return torch.empty(shape, dtype=dtype, device=DEVICE)
