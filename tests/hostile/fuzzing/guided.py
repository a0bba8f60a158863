"""Coverage-guided fuzzing with atheris.

``python -m tests.hostile.fuzzing.guided TARGET [CORPUS …] [-libFuzzer=option …]`` runs a target of
``targets`` until it finds something that breaks a rule, or for as long as the options say. What it
found is a file, whose name in the place of the corpus tries it again. Without a corpus, it starts
from new ``seeds``.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "main"]

#: From where it is run.
ROOT = Path(__file__).resolve().parents[3]

#: What is looked at while it runs.
_PACKAGES = ("underlay", "underlay_drivers", "underlay_storage")
#: Of the command line, which no image reaches.
_LEFT_OUT = ("underlay.cli", "underlay.testing", "underlay.__main__")


def main(arguments: list[str]) -> None:
    """Fuzz; ends the process."""
    # It has no annotations, and is there for some Pythons only.
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=list(_PACKAGES)):
        for package in _PACKAGES:
            _import_all(package)
    from .seeds import make_seeds
    from .targets import TARGETS

    target = TARGETS[arguments[0]]
    if all(argument.startswith("-") for argument in arguments[1:]):
        seeds = Path(tempfile.mkdtemp(prefix="underlay-fuzz-"))
        make_seeds(seeds)
        arguments = [*arguments, str(seeds / target.name)]

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        # Its own mutations find what a structure does not suggest, and crossed bytes.
        if seed % 4 == 0 or not target.groups:
            return bytes(atheris.Mutate(data, longest))
        return target.mutate(data, longest, seed)

    atheris.Setup([sys.argv[0], *arguments[1:]], target.run, custom_mutator=mutate)
    atheris.Fuzz()


def _import_all(name: str) -> None:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(module.__path__, f"{name}."):
        if not found.name.startswith(_LEFT_OUT):
            importlib.import_module(found.name)


if __name__ == "__main__":
    main(sys.argv[1:])
