"""Names of files that every file system takes."""

import pytest

from pixart_pack.pixart.files.names import fault_of, has_hidden_letters, is_device

GOOD = ("my_style", "Größe 1.5 [v2]", ".hidden", "画风", "console", "com10", "null.txt", "a..b", "👩\u200d🎨")
BAD = ("", ".", "..", " . ", "a/b", "a\\b", "C:", 'a"b', "a|b", "a?", "a*", "<a>", "a\0b", "a\nb", "a\x7fb", "\x85")
BAD += (
    "~",
    "~me",
    "a\u202egpj.exe",
    "\u200fa",
    "\u2066a",
    "\ufeffa",
    "a\u2028b",
    "\ud800",
    "a ",
    " a",
    "a.",
    "x" * 101,
    "画" * 67,
)
DEVICES = ("CON", "nul", "NUL.txt", "Aux.tar.gz", "com1", "LPT9.safetensors", "COM¹", "conin$", "prn .txt", "con ")


@pytest.mark.parametrize("name", GOOD)
def test_names_that_can_be_used(name):
    assert fault_of(name) is None


@pytest.mark.parametrize("name", BAD + DEVICES)
def test_names_that_cannot_be_used(name):
    fault = fault_of(name)
    assert fault and fault.isprintable()


@pytest.mark.parametrize("name", DEVICES)
def test_devices_of_windows(name):
    assert is_device(name)


def test_ordinary_text_hides_nothing():
    assert not has_hidden_letters("Ein Bild, 一幅画, می\u200cخواهم (1:2)!")
    assert has_hidden_letters("a\u202eb") and has_hidden_letters("a\0")
