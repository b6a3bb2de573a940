"""What the package says of itself: the README as its long description, and where the project lives.

An index shows the long description away from the repository, where links to files of it lead nowhere. They are made
absolute where pyproject.toml names the repository; until it does, they become plain text, and pictures are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURE = re.compile(r"<picture>.*?</picture>\n*", re.DOTALL)
IMAGE = re.compile(r"^[ \t]*!\[[^\]]*\]\((?!\w+:)[^)]+\)\n*", re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)")


class ProjectMetadata(MetadataHookInterface):
    """Sets the long description and, where the repository is published, the addresses of the project."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in what pyproject.toml declares as dynamic."""
        repository = str(self.config.get("repository", "")).rstrip("/")
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": long_description(text, repository)}
        metadata["urls"] = addresses(repository)


def long_description(readme: str, repository: str) -> str:
    """Return the README without relative links and pictures."""
    text = IMAGE.sub("", PICTURE.sub("", readme))
    if not repository:
        return LINK.sub(r"\1", text)
    return LINK.sub(lambda link: f"[{link[1]}]({repository}/blob/main/{link[2]})", text)


def addresses(repository: str) -> dict[str, str]:
    """Return the project URLs by their well-known labels; none while the repository is not published."""
    if not repository:
        return {}
    files = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}
    pages = {label: f"{repository}/blob/main/{path}" for label, path in files.items()}
    return {"Source": repository, "Issues": f"{repository}/issues", **pages}
