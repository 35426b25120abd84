"""Every node, input and output has its help and its names, in English and Chinese, and they say what the code says."""

import json
import re
from pathlib import Path

import pytest

from pixart_pack.editor.help_pages import (
    ENGLISH,
    LANGUAGES,
    LOCALES,
    english_definition,
    our_nodes,
    page_path,
    read_definitions,
    with_lists,
)

ROOT = Path(__file__).parent.parent.parent
CATEGORIES = set(
    "acceleration loaders info conditioning latent image sampling compare controlnet lora training".split()
)
ERROR = re.compile(r"\*\*([^*]+)\*\*")
CHINESE = re.compile("[\u4e00-\u9fff]")


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


def test_chinese_is_chinese(nodes):
    for name, definition in read_definitions("zh").items():
        texts = [definition["description"], *(each["tooltip"] for each in definition["inputs"].values())]
        assert all(CHINESE.search(text) for text in texts), name


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


def test_categories_have_chinese_names():
    main = json.loads((LOCALES / "zh" / "main.json").read_text(encoding="utf-8"))
    assert main["nodeCategories"].keys() == CATEGORIES | {"PixArt"}


def test_the_server_gives_pages_and_translations(start_host):
    host = start_host()
    page = host.get("/extensions/pixart_pack/docs/PixArtTextEncode.md").decode()
    assert ENGLISH.inputs in page
    translations = host.get_json("/i18n")
    assert translations["zh"]["nodeDefs"]["PixArtTextEncode"]["display_name"] == "PixArt 文本编码"
    assert translations["zh"]["nodeCategories"]["sampling"]
