"""Style templates: a named pair of texts around a prompt and its negative."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .files.documents import load_json
from .quoting import list_names, shorten

STYLES_FILE = Path(__file__).resolve().parent.parent / "styles" / "styles.json"
SLOT = "{prompt}"
FILE_LIMIT = 2**22  # bytes; the shipped styles have some thousand
SLOT_LIMIT = 8  # in one style: each holds the whole prompt


@dataclass(frozen=True)
class Style:
    """prompt: a template with SLOT where the user's words go. negative: what the style wants to avoid."""

    name: str
    prompt: str
    negative: str = ""

    def apply(self, prompt: str, negative: str = "") -> tuple[str, str]:
        """The styled prompt and negative. The user's own negative comes first."""
        return self.prompt.replace(SLOT, prompt.strip()), ", ".join(filter(None, (negative.strip(), self.negative)))


PLAIN = Style("No style", SLOT)


def load_styles(files: Iterable[Path] = (STYLES_FILE,)) -> dict[str, Style]:
    """{name: style}, PLAIN first; of equal names the later file's wins. Files that do not exist are skipped.

    A file is a JSON list of {"name", "prompt", "negative"}; negative may be left out.
    Raises ValueError naming the file and the entry.
    """
    styles = {PLAIN.name: PLAIN}
    for file in files:
        if file.is_file():
            styles |= {style.name: style for style in _read(file)}
    return styles


def _read(file: Path) -> list[Style]:
    try:
        entries = load_json(file, FILE_LIMIT)
    except ValueError as error:
        raise ValueError(
            f"Styles file is not JSON: got {file.name} with {shorten(error, 200)}, expected a list of objects. Mend "
            f"the file."
        ) from error
    if not isinstance(entries, list):
        raise ValueError(
            f"Styles file is no list: got {type(entries).__name__} in {file.name}, expected a list of objects with "
            f'"name" and "prompt". Put square brackets around the entries.'
        )
    return [_parse(entry, f"entry {number} of {file.name}") for number, entry in enumerate(entries, start=1)]


def _parse(entry, place: str) -> Style:
    fields = entry if isinstance(entry, dict) else {}
    texts = {key: fields.get(key, "") for key in ("name", "prompt", "negative")}
    if not all(isinstance(text, str) for text in texts.values()) or not texts["name"].strip():
        raise ValueError(
            f'Bad style: got {shorten(entry)} as {place}, expected {{"name": ..., "prompt": ..., "negative": ...}} '
            f"with texts. Mend the file."
        )
    if SLOT not in texts["prompt"]:
        raise ValueError(
            f"Style without a place for the prompt: got {shorten(texts['prompt'])} as {place}, expected {SLOT} in "
            f"it. Write {SLOT} where the user's words go."
        )
    if texts["prompt"].count(SLOT) > SLOT_LIMIT:
        raise ValueError(
            f"Style with too many places for the prompt: got {texts['prompt'].count(SLOT)} as {place}, expected at "
            f"most {SLOT_LIMIT}. Write {SLOT} once."
        )
    return Style(**texts)


def find_styles(names: str, styles: dict[str, Style]) -> list[Style]:
    """The styles of a text with one name on each line or between commas; `*` stands for all. Case does not matter.

    Raises ValueError for a name that there is not, listing those that there are.
    """
    wanted = [name.strip() for line in names.splitlines() for name in line.split(",") if name.strip()]
    if "*" in wanted:
        return list(styles.values())
    by_name = {name.casefold(): style for name, style in styles.items()}
    unknown = [name for name in wanted if name.casefold() not in by_name]
    if unknown:
        raise ValueError(
            f"Unknown style: got {list_names(unknown)}, expected names among {list_names(styles, 64)}. "
            f"Write one of them, or add your own to ComfyUI's user folder (see the node's help)."
        )
    return [by_name[name.casefold()] for name in wanted]
