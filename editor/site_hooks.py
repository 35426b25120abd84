"""Hooks of mkdocs: pages that lie elsewhere in the repository are part of the site, and links to them lead there."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PLACES = (
    *("*.md", "LICENSE", "web/docs/*.md", "web/docs/*.svg"),
    *("benchmarks/results/*", "demo/*.md", "pixart/drawing/fonts/OFL.txt"),
)
LINK = re.compile(r"\]\((?:\.\./)+([^)\s#]+)")


def on_files(files, config):
    """Add what the pages link to outside docs/, under repository/."""
    for pattern in PLACES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.suffix != ".json":
                name = f"repository/{path.relative_to(ROOT).as_posix()}"
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead links out of docs/ to repository/, and those of the repository's own pages back."""
    source = page.file.src_uri
    if not source.startswith("repository/"):
        return LINK.sub(r"](repository/\1", markdown)
    up = "../" * source.count("/")
    folder = source.removeprefix("repository/").rpartition("/")[0]

    def lead(match):
        target = match[2]
        if re.match(r"[a-z]+:|#|/", target):
            return match[0]
        inside = (Path(folder) / target.partition("#")[0]).as_posix()
        parts = []
        for part in inside.split("/"):
            parts = parts[:-1] if part == ".." else [*parts, part]
        path, anchor = "/".join(parts), target[len(target.partition("#")[0]) :]
        place = path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
        return f"{match[1]}({up}{place}{anchor})"

    return re.sub(r"(\])\(([^)\s]+)\)", lead, markdown)
