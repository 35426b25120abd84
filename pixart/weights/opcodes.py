"""Runs the program that a pickle is, with plain containers alone and everything bounded.

Python's own unpickler trusts its input: the hash of a deeply nested key ends the process, that of a key whose parts are
shared never comes to an end, and a number in the file can ask for any amount of memory. Here every step is counted, a
text has a largest length, keys are plain values, and what comes out is neither deep nor endless. Only the functions
that the caller knows are called; all other objects become `Foreign`.
"""

import io
import pickle
import pickletools
import struct
from collections.abc import Callable

import torch

from ..quoting import shorten

# A training checkpoint has some ten thousands of opcodes; these leave room for a history of half a million numbers.
_MOST_STEPS = 2**20
_MOST_BYTES = 2**26  # of one text or byte string
_MOST_BYTES_IN_ALL = 2**28
_MOST_INTEGER_BYTES = 1024
_MOST_LINE = 1024  # bytes of a number or name written as text
# Hashes of numbers and tuples can be foreseen, and equal ones chosen, so their keys are few; those of texts cannot.
_MOST_PLAIN_KEYS = 2**16
_MOST_TUPLE_KEYS = 2**12
_TUPLE_KEY_LENGTH = 8
_MOST_DEPTH = 64
_MOST_VALUES = 2**22  # counting what is shared as often as it is seen


class Foreign:
    """Stands in for every object that is neither a tensor nor a plain container."""

    __slots__ = ()


class Record:
    """An object of a class whose fields are wanted. kind: the class's name. state: what the pickle gave it."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str):
        self.kind, self.state = kind, None


class Function:
    """A function that a pickle may call."""

    __slots__ = ("call",)

    def __init__(self, call: Callable):
        self.call = call


_PLAIN_KEYS = {str, int, float, bool, type(None), bytes, torch.dtype, Foreign, Record}
_CONTAINERS = {list, tuple, dict, set, frozenset}


def run(
    source: io.BufferedIOBase, find: Callable[[str, str], object], load_persistent: Callable[[object], object]
) -> object:
    """What the pickle at the source's position describes; the source is behind it afterwards.

    find: (module, name) -> a Function, Foreign, or a plain value. load_persistent: a persistent id -> its value.
    Raises pickle.UnpicklingError, EOFError or ValueError for what is damaged or beyond a bound.
    """
    return _Machine(source, find, load_persistent).run()


class _Machine:
    def __init__(self, source, find, load_persistent):
        self.read, self.readline = source.read, source.readline
        self.find, self.load_persistent = find, load_persistent
        self.stack, self.below, self.memo = [], [], {}
        self.bytes_left, self.items_left = _MOST_BYTES_IN_ALL, _MOST_STEPS
        self.plain_keys_left, self.tuple_keys_left = _MOST_PLAIN_KEYS, _MOST_TUPLE_KEYS

    def run(self) -> object:
        read = self.read
        for _ in range(_MOST_STEPS):
            code = read(1)
            if code == b".":
                content = self.pop()
                _require_bounded(content)
                return content
            step = _STEPS.get(code)
            if step is None:
                raise _refused(f"the opcode {shorten(code)}") if code else EOFError("the pickle ends too early")
            step(self)
        raise _refused(f"more than {_MOST_STEPS} steps")

    # Arguments

    def take(self, count: int) -> bytes:
        """The next bytes of the program."""
        if not 0 <= count <= _MOST_BYTES:
            raise _refused(f"a text of {count} bytes")
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise _refused(f"more than {_MOST_BYTES_IN_ALL} bytes of texts")
        data = self.read(count)
        if len(data) != count:
            raise EOFError("the pickle ends too early")
        return data

    def line(self, limit: int = _MOST_LINE) -> bytes:
        """The next line without its end."""
        line = self.readline(limit)
        self.bytes_left -= len(line)
        if line[-1:] != b"\n" or self.bytes_left < 0:
            raise _refused("a line without an end")
        return line[:-1]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    # The stack

    def pop(self):
        if not self.stack:
            raise _refused("an empty stack")
        return self.stack.pop()

    def top(self):
        if not self.stack:
            raise _refused("an empty stack")
        return self.stack[-1]

    def pop_to_mark(self) -> list:
        if not self.below:
            raise _refused("no mark")
        items, self.stack = self.stack, self.below.pop()
        return items

    # What steps do

    def call(self, function, arguments) -> None:
        if type(arguments) is not tuple:
            raise _refused("a call without a tuple of arguments")
        self.items_left -= sum(len(each) for each in arguments if type(each) in _CONTAINERS)
        if self.items_left < 0:
            raise _refused("calls with too many values")
        if function is Foreign:
            self.stack.append(Foreign())
        elif type(function) is Function:
            self.stack.append(function.call(*arguments))
        else:
            raise _refused("a call of something else than a function")

    def build(self) -> None:
        state = self.pop()
        if type(self.top()) is Record:
            self.top().state = state
        elif type(self.top()) not in (Foreign, dict):  # a dict was an OrderedDict, whose attributes say nothing
            raise _refused("a state for something else than an object")

    def extend(self, items: list) -> None:
        if type(self.top()) is list:
            self.top().extend(items)
        elif type(self.top()) is not Foreign:
            raise _refused("items for something else than a list")

    def fill(self, items: list) -> None:
        target = self.top()
        if type(target) is dict:
            target.update(self.pairs(items))
        elif type(target) is not Foreign:
            raise _refused("keys for something else than a dict")

    def add(self, items: list) -> None:
        if type(self.top()) is set:
            self.top().update(map(self.key, items))
        elif type(self.top()) is not Foreign:
            raise _refused("members for something else than a set")

    def pairs(self, items: list) -> dict:
        if len(items) % 2:
            raise _refused("a key without a value")
        return {self.key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}

    def key(self, key):
        """The same, when it can be hashed in bounded time. Raises UnpicklingError naming its type otherwise."""
        if type(key) is str:
            return key
        self.plain_keys_left -= 1
        parts, place = (key,), "as"
        if type(key) is tuple and len(key) <= _TUPLE_KEY_LENGTH:
            self.tuple_keys_left -= 1
            parts, place = key, "in"
        for part in parts:
            if type(part) not in _PLAIN_KEYS and part is not Foreign:
                raise _refused(f"{type(part).__name__} {place} a key")
            if type(part) is int and part.bit_length() > 64:
                raise _refused(f"an integer of {part.bit_length()} bits {place} a key")
        if self.plain_keys_left < 0 or self.tuple_keys_left < 0:
            raise _refused("too many keys that are no texts")
        return key

    def recall(self, place: int) -> None:
        if place not in self.memo:
            raise _refused("a memo that was not made")
        self.stack.append(self.memo[place])

    def put(self, place: int) -> None:
        self.memo[place] = self.top()

    def name(self, module, name) -> object:
        if type(module) is not str or type(name) is not str or max(len(module), len(name)) > _MOST_LINE:
            raise _refused("a name that is none")
        return self.find(module, name)


def pairs_of(items: object = ()) -> dict:
    """The dict of an OrderedDict's pairs, as Python 2 wrote them. Raises UnpicklingError for other arguments."""
    pairs = items if type(items) in (list, tuple) else (items,)
    sound = all(type(pair) in (list, tuple) and len(pair) == 2 and type(pair[0]) is str for pair in pairs)
    if not sound:
        raise _refused("an OrderedDict of something else than named values")
    return dict(pairs)


def _refused(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(what)


def _require_bounded(content: object) -> None:
    """Raises UnpicklingError for containers that are deep, hold themselves, or are shared beyond all measure."""
    measured: dict[int, tuple[int, int]] = {}  # id -> depth, values in all
    opened = set()
    pending = [content] if type(content) in _CONTAINERS else []
    while pending:
        value = pending[-1]
        if id(value) in measured:
            pending.pop()
            continue
        items = value.values() if type(value) is dict else value
        inside = [item for item in items if type(item) in _CONTAINERS]
        if id(value) not in opened:
            opened.add(id(value))
            new = [item for item in inside if id(item) not in measured]
            if any(id(item) in opened for item in new):
                raise _refused("a container within itself")
            pending += new
            if new:
                continue
        pending.pop()
        depth = 1 + max((measured[id(item)][0] for item in inside), default=0)
        count = len(value) + sum(measured[id(item)][1] for item in inside)
        if depth > _MOST_DEPTH or count > _MOST_VALUES:
            raise _refused(f"containers nested {depth} deep" if depth > _MOST_DEPTH else f"{count} values in all")
        measured[id(value)] = depth, count


def _integer(data: bytes) -> int:
    if len(data) > _MOST_INTEGER_BYTES:
        raise _refused(f"an integer of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _value(make: Callable) -> Callable:
    """The step that puts a value made of the program's next bytes on the stack."""

    def step(machine):
        value = make(machine)  # which may change what is the stack
        machine.stack.append(value)

    return step


def _number(form: str) -> Callable:
    return _value(lambda machine: machine.number(form))


def _sized(form: str, decode: Callable[[bytes], object]) -> Callable:
    """The step that puts a value whose length comes first on the stack."""
    return _value(lambda machine: decode(machine.take(machine.number(form))))


def _line(reader: Callable, limit: int = _MOST_LINE) -> Callable:
    """The step for a value that is written as a line, read by one of pickletools' functions."""
    return _value(lambda machine: reader(io.BytesIO(machine.line(limit) + b"\n")))


def _tuple(count: int) -> Callable:
    def step(machine):
        if len(machine.stack) < count:
            raise _refused("an empty stack")
        machine.stack[len(machine.stack) - count :] = [tuple(machine.stack[len(machine.stack) - count :])]

    return step


def _mark(machine) -> None:
    machine.below.append(machine.stack)
    machine.stack = []


def _pop(machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_to_mark()


def _call(machine) -> None:
    arguments = machine.pop()
    machine.call(machine.pop(), arguments)


def _call_with_names(machine) -> None:
    machine.pop()  # no known function takes arguments by name
    _call(machine)


def _call_marked(machine) -> None:
    function, *arguments = machine.pop_to_mark() or (None,)
    machine.call(function, tuple(arguments))


def _call_named(machine) -> None:
    function = machine.name(*_names(machine))
    machine.call(function, tuple(machine.pop_to_mark()))


def _names(machine) -> tuple[str, str]:
    return machine.line().decode(), machine.line().decode()


def _stacked_name(machine) -> None:
    name = machine.pop()
    machine.stack.append(machine.name(machine.pop(), name))


def _set_item(machine) -> None:
    value = machine.pop()
    machine.fill([machine.pop(), value])


def _text(data: bytes) -> str:
    return str(data, "utf-8", "surrogatepass")


def _latin(data: bytes) -> str:
    return str(data, "latin-1")  # byte strings of Python 2


_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.PROTO: lambda machine: machine.number("B"),
    pickle.FRAME: lambda machine: machine.number("<Q"),
    # Scalars
    pickle.NONE: _value(lambda machine: None),
    pickle.NEWTRUE: _value(lambda machine: True),
    pickle.NEWFALSE: _value(lambda machine: False),
    pickle.BININT: _number("<i"),
    pickle.BININT1: _value(lambda machine: machine.read(1)[0]),
    pickle.BININT2: _number("<H"),
    pickle.BINFLOAT: _number(">d"),
    pickle.INT: _line(pickletools.read_decimalnl_short),
    pickle.LONG: _line(pickletools.read_decimalnl_long),
    pickle.FLOAT: _line(pickletools.read_floatnl),
    pickle.LONG1: _sized("B", _integer),
    pickle.LONG4: _sized("<i", _integer),
    # Texts
    pickle.STRING: _line(pickletools.read_stringnl, _MOST_BYTES),
    pickle.UNICODE: _line(pickletools.read_unicodestringnl, _MOST_BYTES),
    pickle.BINSTRING: _sized("<i", _latin),
    pickle.SHORT_BINSTRING: _sized("B", _latin),
    pickle.SHORT_BINUNICODE: _sized("B", _text),
    pickle.BINUNICODE: _sized("<I", _text),
    pickle.BINUNICODE8: _sized("<Q", _text),
    pickle.SHORT_BINBYTES: _sized("B", bytes),
    pickle.BINBYTES: _sized("<I", bytes),
    pickle.BINBYTES8: _sized("<Q", bytes),
    pickle.BYTEARRAY8: _sized("<Q", bytes),
    # Containers
    pickle.EMPTY_TUPLE: _value(lambda machine: ()),
    pickle.EMPTY_LIST: _value(lambda machine: []),
    pickle.EMPTY_DICT: _value(lambda machine: {}),
    pickle.EMPTY_SET: _value(lambda machine: set()),
    pickle.TUPLE1: _tuple(1),
    pickle.TUPLE2: _tuple(2),
    pickle.TUPLE3: _tuple(3),
    pickle.TUPLE: _value(lambda machine: tuple(machine.pop_to_mark())),
    pickle.LIST: _value(lambda machine: machine.pop_to_mark()),
    pickle.DICT: _value(lambda machine: machine.pairs(machine.pop_to_mark())),
    pickle.FROZENSET: _value(lambda machine: frozenset(map(machine.key, machine.pop_to_mark()))),
    pickle.APPEND: lambda machine: machine.extend([machine.pop()]),
    pickle.APPENDS: lambda machine: machine.extend(machine.pop_to_mark()),
    pickle.SETITEM: _set_item,
    pickle.SETITEMS: lambda machine: machine.fill(machine.pop_to_mark()),
    pickle.ADDITEMS: lambda machine: machine.add(machine.pop_to_mark()),
    # The stack and the memo
    pickle.MARK: _mark,
    pickle.POP: _pop,
    pickle.POP_MARK: lambda machine: machine.pop_to_mark(),
    pickle.DUP: _value(lambda machine: machine.top()),
    pickle.GET: lambda machine: machine.recall(int(machine.line())),
    pickle.BINGET: lambda machine: machine.recall(machine.read(1)[0]),
    pickle.LONG_BINGET: lambda machine: machine.recall(machine.number("<I")),
    pickle.PUT: lambda machine: machine.put(int(machine.line())),
    pickle.BINPUT: lambda machine: machine.put(machine.read(1)[0]),
    pickle.LONG_BINPUT: lambda machine: machine.put(machine.number("<I")),
    pickle.MEMOIZE: lambda machine: machine.put(len(machine.memo)),
    # Objects
    pickle.GLOBAL: _value(lambda machine: machine.name(*_names(machine))),
    pickle.STACK_GLOBAL: _stacked_name,
    pickle.REDUCE: _call,
    pickle.NEWOBJ: _call,
    pickle.NEWOBJ_EX: _call_with_names,
    pickle.OBJ: _call_marked,
    pickle.INST: _call_named,
    pickle.BUILD: lambda machine: machine.build(),
    pickle.BINPERSID: _value(lambda machine: machine.load_persistent(machine.pop())),
}
