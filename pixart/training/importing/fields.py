"""How one field of another trainer's configuration becomes settings, and what is kept of all that were read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...quoting import plain, shorten

NOTHING = (None, False, "", 0, 0.0, "none", "None", "NONE", "OFF", "off", "false", "no")


@dataclass
class Imported:
    """What was read. settings: of TrainingSettings. run: of RunConfig. notes: what whoever trains is to know.

    left: fields that have no counterpart here, with values that say something.
    """

    settings: dict = field(default_factory=dict)
    run: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


Reader = Callable[[object, Mapping, Imported], None]  # a value, all fields, and what it goes into


def read_fields(given: Mapping, readers: Mapping[str, Reader], idle: frozenset[str]) -> Imported:
    """Read all fields in the order of the readers. idle: fields that decide nothing about what is learned."""
    found = Imported()
    for name, reader in readers.items():
        if name in given and given[name] is not None:
            reader(given[name], given, found)
    for name, value in given.items():
        if name not in readers and name not in idle and not isinstance(value, dict) and value not in NOTHING:
            found.left.append(f"{plain(name, 60)}: {shorten(value, 60)}")
    return found


def refuse(name: str, value: object, expected: str):
    """Raise the ValueError of a field that means something which cannot be had here."""
    raise ValueError(
        f"Means another training: got {plain(name, 80)} {shorten(value, 80)}, expected {expected}. Change it in the "
        f"other program's file, or write the configuration by hand."
    )


def to(name: str, kind: Callable = lambda value: value) -> Reader:
    """Taken as the setting of this name."""

    def read(value, _given, found):
        found.settings[name] = kind(value)

    return read


def to_run(name: str) -> Reader:
    """Taken as the field of the run of this name."""

    def read(value, _given, found):
        if value:
            found.run[name] = str(value)

    return read


def choose(field_name: str, name: str, choices: Mapping, expected: str | None = None) -> Reader:
    """Taken as one of some values; others are refused. A choice may be several settings."""

    def read(value, _given, found):
        key = value.lower() if isinstance(value, str) else value
        if key not in choices:
            refuse(field_name, value, expected or f"one of {', '.join(map(str, choices))}")
        chosen = choices[key]
        found.settings |= chosen if isinstance(chosen, dict) else {name: chosen}

    return read


def only(field_name: str, *values) -> Reader:
    """Refused with any other value than these, which change nothing."""

    def read(value, _given, _found):
        if value not in values and str(value).lower() not in map(str, values):
            refuse(field_name, value, str(values[0]))

    return read


def number(value) -> float:
    """A number that may be written as a text. Raises ValueError for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Number cannot be read: got {shorten(value)}, expected one such as 1e-4. Correct it in the file."
        ) from error


def whole(value) -> int:
    """A whole number that may be written as a text."""
    return int(number(value))


def yes(value) -> bool:
    """Whether a value that may be written as a text says yes."""
    return value is True or str(value).lower() in ("true", "1", "yes", "on")


def epochs(value, given, found):
    """Epochs, which are counted in steps here."""
    if value:
        found.notes.append(
            f"{shorten(value)} epochs: set steps to epochs times pictures divided by batch size and accumulation"
        )
