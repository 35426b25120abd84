"""What a stranger would put into the texts and lists of a prompt."""

import os
from pathlib import Path

SECRET = "the-secret-line"
NAMES = (
    *("../../etc/passwd", "/etc/passwd", "..\\..\\x", "C:\\Windows\\x", "C:x", "\\\\server\\share", "//server/share/x"),
    *("CON", "NUL.txt", "a\0b", "x" * 300, "\u202egpj.exe", "a\nb\x07", "~/.ssh/id_rsa", "$HOME/x", "a. ", "..", "."),
    *("output/../../../etc/passwd.safetensors", "embedding:../../x", "file:///etc/passwd", "%year%/../../../x"),
)


def write_decoy(folder: Path) -> Path:
    """A folder outside of the host's with one file of each kind that nodes read, and SECRET in them."""
    folder.mkdir(parents=True)
    (folder / "table.csv").write_text(f"picture,text,{SECRET}\n{SECRET},b,c\n")
    (folder / "features.json").write_text(f'{{"{SECRET}": "{SECRET}"}}')
    for name in ("weights.safetensors", "weights.pth", "spiece.model", "config.json"):
        (folder / name).write_text(SECRET)
    return folder


def names_for(decoy: Path, places: list[Path]) -> list[str]:
    """NAMES, and the ways to the decoy: absolute, through a link in a place, and up from each place."""
    found = [*NAMES, str(decoy), *(str(file) for file in decoy.iterdir())]
    for place in places:
        up = os.path.relpath(decoy, place)
        found += [f"{up}/table.csv", f"{up}/weights.safetensors", f"{up}/"]
    return list(dict.fromkeys(found))
