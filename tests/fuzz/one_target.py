"""One parser under atheris: one_target.py NAME CORPUS [libFuzzer's options]"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
with atheris.instrument_imports(include=["surgery", "json", "yaml"]):
    import targets

name = sys.argv.pop(1)
targets.attempt(name, targets.seeds(name)[0])  # what it imports, outside an input's time
atheris.Setup(sys.argv, lambda data: targets.attempt(name, data) and None)
atheris.Fuzz()
