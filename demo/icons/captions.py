"""Captions of scenes in words such as a visitor would take: counted, with or without places, sizes and backgrounds."""

from random import Random

from .scenes import COLUMNS, POSITIONS, ROWS, Background, Item, Scene

# name: its words, each with its plural.
WORDS = {
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"),),
    "triangle": (("triangle", "triangles"),),
    "cross": (("cross", "crosses"),),
    "star": (("star", "stars"),),
    "heart": (("heart", "hearts"),),
    "ring": (("ring", "rings"),),
    "moon": (("moon", "moons"), ("crescent", "crescents"), ("crescent moon", "crescent moons")),
    "arrow": (("arrow", "arrows"),),
    "flower": (("flower", "flowers"), ("blossom", "blossoms")),
    "house": (("house", "houses"), ("home", "homes")),
    "tree": (("tree", "trees"),),
    "fish": (("fish", "fish"),),
    "cat": (("cat", "cats"), ("cat's head", "cat's heads"), ("kitten", "kittens")),
}
_NUMBERS = ("", "a", "two", "three", "four")
_SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
_FILLINGS = {"striped": ("striped", "stripy"), "dotted": ("dotted", "spotted")}
_TRAILS = {"striped": "with stripes", "dotted": "with dots"}
_PLACES = {
    name: (f"in the {name}", f"at the {name}", f"in the {name} corner", f"in the {name.replace('top', 'upper')}")
    for name in POSITIONS
}
_PLACES |= {name: (f"on the {name}", f"at the {name}", f"on the {name} side") for name in ("left", "right")}
_PLACES |= {name: (f"at the {name}", f"on the {name}") for name in ("top", "bottom")}
_PLACES["center"] = ("in the center", "in the middle")
_OPENINGS = ("a picture of", "a drawing of", "an icon of", "clip art of")


def _article(words: str) -> str:
    return f"an {words[2:]}" if words.startswith("a ") and words[2] in "aeiou" else words


def groups(scene: Scene) -> list[list[Item]]:
    """The items, those of one shape, colour and filling together."""
    found: dict[tuple, list[Item]] = {}
    for item in scene.items:
        found.setdefault((item.shape, item.colour, item.filling), []).append(item)
    return list(found.values())


def _name(group: list[Item], rng: Random) -> str:
    """The group without its place."""
    first, many = group[0], len(group) > 1
    words = [_NUMBERS[len(group)]]
    if len({item.size for item in group}) == 1 and rng.random() < 0.5:
        words.append(rng.choice(_SIZES[first.size]))
    trailing = first.filling != "plain" and rng.random() < 0.25
    if first.filling != "plain" and not trailing:
        words.append(rng.choice(_FILLINGS[first.filling]))
    if rng.random() < 0.94:
        words.append(first.colour)
    words.append(rng.choice(WORDS[first.shape])[many])
    if trailing:
        words.append(_TRAILS[first.filling])
    return _article(" ".join(words))


def _place(group: list[Item], rng: Random) -> str:
    """Where the group is: its place, the row or column that it fills, or all of its places."""
    if len(group) == 1:
        return rng.choice(_PLACES[group[0].position])
    rows, columns = ({POSITIONS[item.position][axis] for item in group} for axis in (0, 1))
    if len(rows) == 1:
        name = ROWS[rows.pop()] or "center"
        return rng.choice((f"{_PLACES[name][0]}", f"in a row {_PLACES[name][0]}", f"side by side {_PLACES[name][0]}"))
    if len(columns) == 1:
        name = COLUMNS[columns.pop()] or "center"
        return rng.choice((f"{_PLACES[name][0]}", f"in a column {_PLACES[name][0]}"))
    return " and ".join(_PLACES[item.position][0] for item in group)


def _relation(one: list[Item], other: list[Item], rng: Random) -> str | None:
    """Words for how the first group lies to the second; None where there are none."""
    (rows, columns), (other_rows, other_columns) = (
        zip(*(POSITIONS[item.position] for item in group), strict=True) for group in (one, other)
    )
    choices = []
    if max(rows) < min(other_rows):
        choices += ["over", "above"]
    if min(rows) > max(other_rows):
        choices += ["under", "below"]
    if {*rows} == {*other_rows} and len({*rows}) == 1:
        choices += ["next to", "beside"]
    if max(columns) < min(other_columns):
        choices += ["to the left of", "left of"]
    if min(columns) > max(other_columns):
        choices += ["to the right of", "right of"]
    return rng.choice(choices) if choices else None


def _things(scene: Scene, rng: Random) -> str:
    parts = groups(scene)
    rng.shuffle(parts)
    said = rng.choices((1.0, 0.5, 0.0), (6, 2, 2))[0]  # share of the places
    relation = _relation(*parts, rng) if len(parts) == 2 and rng.random() < 0.5 else None
    if relation and rng.random() < 0.7:
        said = 0.0
    phrases = [f"{_name(part, rng)} {_place(part, rng) if rng.random() < said else ''}".strip() for part in parts]
    if relation:
        return f"{phrases[0]} {relation} {phrases[1]}"
    joints = rng.choice(((", ", " and "), (" and ", " and "), (", ", ", ")))
    return joints[1].join([joints[0].join(phrases[:-1])] * (len(phrases) > 1) + phrases[-1:])


def _describe_background(background: Background, things: str, rng: Random) -> str:
    top, bottom = background.top, background.bottom
    if background.kind == "plain":
        return rng.choice(
            (
                f"{things} on a {top} background",
                f"{things}, {top} background",
                f"{things} against a {top} background",
                f"{things} on {top}",
                f"a {top} background with {things}",
            )
        )
    if background.kind == "gradient":
        return rng.choice(
            (
                f"{things} on a gradient from {top} to {bottom}",
                f"{things} on a background that fades from {top} to {bottom}",
                f"{things}, {top} to {bottom} gradient",
            )
        )
    return rng.choice(
        (
            f"{things} with a {top} sky and {bottom} ground",
            f"{things} between a {top} sky and {bottom} ground",
            f"{things}, {top} sky, {bottom} ground",
        )
    )


def describe(scene: Scene, rng: Random) -> str:
    """Put the scene into words, lower case; others with every draw of `rng`, some attributes now and then unsaid."""
    things = _things(scene, rng)
    if rng.random() < 0.12:
        things = f"{rng.choice(_OPENINGS)} {things}"
    return things if rng.random() < 0.12 else _describe_background(scene.background, things, rng)


def caption(scene: Scene) -> str:
    """The plainest caption, every attribute said: what evaluations use."""
    filled = {"plain": "", "striped": "striped ", "dotted": "dotted "}
    things = (
        _article(f"a {item.size} {filled[item.filling]}{item.colour} {item.shape} {_PLACES[item.position][0]}")
        for item in scene.items
    )
    background = scene.background
    ground = {
        "plain": f"on a {background.top} background",
        "gradient": f"on a gradient from {background.top} to {background.bottom}",
        "horizon": f"with a {background.top} sky and {background.bottom} ground",
    }
    return f"{' and '.join(things)} {ground[background.kind]}"
