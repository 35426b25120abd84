"""The help pages of the nodes and their names in other languages, as far as the schemas say them.

`python dev.py run -m pixart_pack.editor.help_pages` rewrites the lists of inputs and outputs in
`web/docs/<node_id>.md` and `web/docs/<node_id>/zh.md`, and `locales/en/nodeDefs.json` whole. The rest of the pages, and
`locales/<language>/nodeDefs.json`, are written by hand; what is missing there is listed, and so are translations of a
text that has changed since. `--still-right` says that those hold as they are.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from ..devtools.process import ROOT
from .connection import connect
from .format.schema import Input, inputs_of
from .translations import read_lines, record, stale_places, write_lines

DOCS = ROOT / "web" / "docs"
LOCALES = ROOT / "locales"
PREFIX = "PixArt"
MOST_CHOICES = 10
FILE_NAME = re.compile(r"\.(safetensors|pth|pt|bin|ckpt|sft|json|txt)$|/$")
LISTS = re.compile(r"(?<=<!-- lists -->\n).*?(?=<!-- end of lists -->)", re.DOTALL)


@dataclass(frozen=True)
class Words:
    """What the lists are written with in one language."""

    inputs: str
    outputs: str
    optional: str
    default: str
    range: str
    files: str
    no_inputs: str
    no_outputs: str


ENGLISH = Words(
    inputs="Inputs",
    outputs="Outputs",
    optional="optional",
    default="default {}",
    range="{} to {}",
    files="one of the list",
    no_inputs="This node has no inputs.",
    no_outputs="This node has no outputs.",
)
CHINESE = Words(
    inputs="输入",
    outputs="输出",
    optional="可选",
    default="默认 {}",
    range="{} 至 {}",
    files="从列表中选择",
    no_inputs="此节点没有输入。",
    no_outputs="此节点没有输出。",
)
LANGUAGES = {"en": ENGLISH, "zh": CHINESE}
NAMES_ONLY = ("ja", "ko", "ru", "fr", "es")  # languages that have names and tooltips, and no pages


def page_path(node_id: str, language: str) -> Path:
    """Where the editor looks for a page: the English one serves every language that has none."""
    return DOCS / f"{node_id}.md" if language == "en" else DOCS / node_id / f"{language}.md"


def our_nodes(object_info: dict) -> dict:
    """The object_info of this pack's nodes alone, without those that stand for another pack's."""
    found = sorted(object_info.items())
    return {name: info for name, info in found if name.startswith(PREFIX) and not info["deprecated"]}


def english_definition(info: dict) -> dict:
    """A node's entry of nodeDefs.json, of its schema."""
    tooltips = info.get("output_tooltips") or [""] * len(info["output"])
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {
            each.name: {"name": each.name, "tooltip": each.options.get("tooltip", "")} for each in inputs_of(info)
        },
        "outputs": {
            str(slot): {"name": name, "tooltip": tooltip or ""}
            for slot, (name, tooltip) in enumerate(zip(info["output_name"], tooltips, strict=True))
        },
    }


def lists(info: dict, definition: dict, words: Words) -> str:
    """The lists of a page. definition: the node's entry of nodeDefs.json in the page's language."""
    inputs = []
    for each in inputs_of(info):
        entry = definition["inputs"][each.name]
        facts = [each.type, *([words.optional] if each.optional else []), *_values(each, words)]
        inputs.append(f"- **{_shown(each.name, entry)}** ({'; '.join(facts)})  \n  {_line(entry['tooltip'])}")
    outputs = [
        f"- **{entry['name']}** ({kind})  \n  {_line(entry['tooltip'])}"
        for kind, entry in zip(info["output"], definition["outputs"].values(), strict=True)
    ]
    parts = (f"## {words.inputs}", "\n".join(inputs) or words.no_inputs)
    return "\n\n".join((*parts, f"## {words.outputs}", "\n".join(outputs) or words.no_outputs))


def _shown(name: str, entry: dict) -> str:
    return name if entry["name"] == name else f"{entry['name']} · {name}"


def _line(text: str) -> str:
    return text.replace("\n", " ").replace("*", "\\*").replace("<", "&lt;")


def _values(each: Input, words: Words) -> list[str]:
    if not each.is_widget:
        return []
    values = []
    if each.type == "COMBO":
        choices = [str(choice) for choice in each.options.get("options") or ()]
        if len(choices) < 2 or len(choices) > MOST_CHOICES or any(map(FILE_NAME.search, choices)):
            return [words.files]
        values.append(", ".join(f"`{choice}`" for choice in choices))
    elif each.type in ("INT", "FLOAT"):
        values.append(words.range.format(each.options.get("min", 0), each.options.get("max", "∞")))
    default = each.options.get("default", "")
    if default != "" and not each.is_multiline:
        shown = default if isinstance(default, str) else json.dumps(default)
        values.append(words.default.format(f"`{shown}`"))
    return values


def read_definitions(language: str) -> dict:
    path = LOCALES / language / "nodeDefs.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def with_lists(page: str, info: dict, definition: dict, words: Words) -> str:
    """The page with today's lists. Raises ValueError when it has no place for them."""
    if not LISTS.search(page):
        raise ValueError("No place for the lists: expected the lines <!-- lists --> and <!-- end of lists -->")
    return LISTS.sub(lambda _: f"\n{lists(info, definition, words)}\n\n", page)


def write_pages(object_info: dict, still_right: bool = False) -> list[str]:
    """Write all that follows from the schemas; returns what is missing or stale.

    still_right: translations that were there before their English text hold as they are.
    """
    nodes, missing = our_nodes(object_info), []
    english = {name: english_definition(info) for name, info in nodes.items()}
    path = LOCALES / "en" / "nodeDefs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(english, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for language, words in LANGUAGES.items():
        definitions = read_definitions(language)
        for name, info in nodes.items():
            page = page_path(name, language)
            if name not in definitions or not page.exists():
                missing.append(f"{page.relative_to(ROOT)} or its entry in locales/{language}/nodeDefs.json")
                continue
            page.write_text(
                with_lists(page.read_text(encoding="utf-8"), info, definitions[name], words), encoding="utf-8"
            )
    translated = {language: read_definitions(language) for language in ("zh", *NAMES_ONLY)}
    lines = record(english, translated, read_lines(LOCALES), still_right)
    write_lines(LOCALES, lines)
    missing += [f"{name} in locales/{language}" for language in NAMES_ONLY for name in untranslated(language)]
    return missing + [f"a translation of today's text in {place}" for place in stale_places(english, lines)]


def untranslated(language: str) -> list[str]:
    """What of the English names and texts a language lacks: nodes, or inputs and outputs as `node.inputs.name`."""
    english, given, missing = read_definitions("en"), read_definitions(language), []
    for name, expected in english.items():
        found = given.get(name, {})
        if not (found.get("display_name") and found.get("description")):
            missing.append(name)
        for kind in ("inputs", "outputs"):
            parts = found.get(kind, {})
            missing += [
                f"{name}.{kind}.{part}"
                for part in expected[kind].keys() | parts.keys()
                if part not in expected[kind] or not (parts.get(part, {}).get("name") and parts[part].get("tooltip"))
            ]
    return sorted([*missing, *(given.keys() - english.keys())])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a running server to ask, in place of one of its own")
    parser.add_argument("--still-right", action="store_true", help="translations hold though their text has changed")
    options = parser.parse_args(arguments)
    with connect(options.url) as client:
        missing = write_pages(client.get_json("/object_info"), options.still_right)
    for each in missing:
        sys.stderr.write(f"missing: {each}\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
