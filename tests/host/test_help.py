"""Every node, input and output has its help and its names, in every language, and they say what the code says."""

import json
import re
from pathlib import Path

import pytest

from pixart_pack.editor.help_pages import (
    ENGLISH,
    LANGUAGES,
    LOCALES,
    NAMES_ONLY,
    english_definition,
    our_nodes,
    page_path,
    read_definitions,
    untranslated,
    with_lists,
)

ROOT = Path(__file__).parent.parent.parent
CATEGORIES = set(
    "acceleration loaders info conditioning latent image sampling compare controlnet lora training".split()
)
ERROR = re.compile(r"\*\*([^*]+)\*\*")
# A sign of the language in a text of it; of languages in Latin letters, letters and words that English has not.
SIGNS = {
    "zh": "[\u4e00-\u9fff]",
    "ja": "[\u3040-\u30ff\u4e00-\u9fff]",
    "ko": "[\uac00-\ud7a3]",
    "ru": "[\u0400-\u04ff]",
    "fr": r"(?i)\b(de|du|des|le|la|les|un|une|et|à|pour|d|l)\b",
    "es": r"(?i)\b(de|del|el|la|los|las|un|una|y|para|con|en|por)\b",
}


@pytest.fixture(scope="module")
def nodes(start_host):
    return our_nodes(start_host().object_info())


def test_english_names_are_those_of_the_schemas(nodes):
    # Mend with: python dev.py run -m pixart_pack.editor.help_pages
    assert read_definitions("en") == {name: english_definition(info) for name, info in nodes.items()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_input_and_output_has_a_name_and_a_text(nodes, language):
    definitions = read_definitions(language)
    assert definitions.keys() == nodes.keys()
    for name, info in nodes.items():
        expected, given = english_definition(info), definitions[name]
        assert given["display_name"] and given["description"], name
        for kind in ("inputs", "outputs"):
            assert given[kind].keys() == expected[kind].keys(), name
            assert all(each["name"] and each["tooltip"] for each in given[kind].values()), name


@pytest.mark.parametrize("language", NAMES_ONLY)
def test_nothing_lacks_a_translation(language):
    assert untranslated(language) == []


@pytest.mark.parametrize("language", SIGNS)
def test_a_translation_is_in_its_language(language):
    english = read_definitions("en")
    for name, definition in read_definitions(language).items():
        texts = [definition["description"], *(each["tooltip"] for each in definition["inputs"].values())]
        known = {"ControlNet.", "VAE.", "CLIP.", "LoRA."}  # the same everywhere
        odd = [text for text in texts if not re.search(SIGNS[language], text) and text not in known]
        assert all(len(text) < 60 and language in ("fr", "es") for text in odd), (name, odd)
        assert definition["description"] != english[name]["description"], name


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_a_page_that_is_up_to_date(nodes, language):
    # Mend with: python dev.py run -m pixart_pack.editor.help_pages
    definitions = read_definitions(language)
    for name, info in nodes.items():
        page = page_path(name, language).read_text(encoding="utf-8")
        assert page.startswith(f"# {definitions[name]['display_name']}\n"), name
        assert page == with_lists(page, info, definitions[name], LANGUAGES[language]), name


def test_no_page_is_left_of_a_node_that_is_gone(nodes):
    pages = [path for path in page_path("x", "en").parent.rglob("*.md")]
    assert {path.stem if path.parent.name == "docs" else path.parent.name for path in pages} == nodes.keys()


def test_errors_in_the_pages_are_errors_of_the_code(nodes):
    files = [path for folder in ("nodes", "pixart", "samplers") for path in (ROOT / folder).rglob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    for name in nodes:
        for language, heading in (("en", "## Errors"), ("zh", "## 错误")):
            section = page_path(name, language).read_text(encoding="utf-8").partition(heading)[2]
            for line in section.splitlines():
                told = ERROR.findall(re.split("[:：]", line)[0]) if line.startswith("- ") else ()
                assert not [error for error in told if error not in code], (name, language)


def test_categories_and_aliases_lead_to_the_nodes(nodes):
    for name, info in nodes.items():
        assert info["category"].split("/") == ["PixArt", info["category"].split("/")[-1]], name
        assert info["category"].split("/")[1] in CATEGORIES, name
        aliases = info.get("search_aliases")
        if aliases is not None:  # an older ComfyUI has none
            assert len(aliases) >= 2 and len(set(aliases)) == len(aliases), name
            assert all(alias == alias.lower() for alias in aliases), name


@pytest.mark.parametrize("language", ["zh", *NAMES_ONLY])
def test_categories_have_names_in_other_languages(language):
    main = json.loads((LOCALES / language / "main.json").read_text(encoding="utf-8"))
    assert main["nodeCategories"].keys() == CATEGORIES | {"PixArt"}


def test_the_server_gives_pages_and_translations(start_host):
    host = start_host()
    page = host.get("/extensions/pixart_pack/docs/PixArtTextEncode.md").decode()
    assert ENGLISH.inputs in page
    translations = host.get_json("/i18n")
    assert translations["zh"]["nodeDefs"]["PixArtTextEncode"]["display_name"] == "PixArt 文本编码"
    assert all(translations[language]["nodeCategories"]["sampling"] for language in ("zh", *NAMES_ONLY))
    assert translations["ko"]["nodeDefs"]["PixArtTextEncode"]["display_name"] == "PixArt 텍스트 인코딩"
