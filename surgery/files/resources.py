"""Templates and recipes: inside the installed package, or at the top of the repository."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import SurgeryError


def resource_folder(name: str) -> Path:
    """The folder `hub_cards` or `recipes`; SurgeryError when the installation lacks it."""
    package = Path(__file__).parent.parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise SurgeryError(f"This installation lacks its folder {name}; install the package again.")
