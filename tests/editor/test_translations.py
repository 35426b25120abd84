"""Translations that were made from another English text than today's are noticed, in this pack too."""

import json
from pathlib import Path

import pytest

from pixart_pack.editor.translations import LANGUAGES, read_lines, record, stale_places, write_lines

LOCALES = Path(__file__).parents[2] / "locales"


def definitions(**texts):
    return {
        "A": {
            "display_name": "",
            "description": "",
            "inputs": {name: {"tooltip": text} for name, text in texts.items()},
        }
    }


def translations(**texts):
    return {each: definitions(**{name: f"{text} in {each}" for name, text in texts.items()}) for each in LANGUAGES}


@pytest.fixture
def known():
    return record(definitions(steps="Steps.", cfg="Guidance."), translations(steps="S", cfg="G"), {})


def test_what_is_translated_is_entered_once_and_kept_in_a_file(known, tmp_path):
    assert stale_places(definitions(steps="Steps.", cfg="Guidance."), known) == []
    write_lines(tmp_path, known)
    assert read_lines(tmp_path) == known and read_lines(tmp_path / "none") == {}


def test_a_changed_text_makes_its_translations_stale(known):
    changed = definitions(steps="Steps of 1.", cfg="Guidance.")
    assert stale_places(changed, known) == [f"{each}: A.inputs.steps" for each in LANGUAGES]
    lines = record(changed, translations(steps="S", cfg="G"), known)  # as they were
    assert stale_places(changed, lines) == [f"{each}: A.inputs.steps" for each in LANGUAGES]
    partly = {**translations(steps="S", cfg="G"), "ja": definitions(steps="S1", cfg="G in ja")}
    lines = record(changed, partly, lines)
    assert stale_places(changed, lines) == [f"{each}: A.inputs.steps" for each in LANGUAGES if each != "ja"]
    assert stale_places(changed, record(changed, partly, lines, holds=True)) == []


def test_the_same_text_elsewhere_may_have_the_same_translation(known):
    more = definitions(steps="Steps.", cfg="Guidance.", more="Steps.", other="New.")
    given = translations(steps="S", cfg="G", more="S", other="G")
    assert stale_places(more, record(more, given, known)) == [f"{each}: A.inputs.other" for each in LANGUAGES]


def test_no_translation_of_the_pack_is_stale():
    # Mend by translating, then: python dev.py run -m pixart_pack.editor.help_pages
    english = json.loads((LOCALES / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert stale_places(english, read_lines(LOCALES)) == []
