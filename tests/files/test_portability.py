"""What is POSIX's or Linux's alone has a replacement: the same bytes come out without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import script

import surgery
from surgery.errors import BadCheckpoint, BadSettings
from surgery.files import locks, paths, staging
from surgery.outputs.plan import check_apart

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Tiny = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes | None]]


def without(*words: str, **options: str) -> subprocess.CompletedProcess[str]:
    """Python, with the folder of `as_on_windows` on its path."""
    path = os.pathsep.join([str(ROOT), str(HERE), str(HERE.parent)])
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **options},
    )


_JOB = """
import sys
import as_on_windows
from pathlib import Path
import surgery
source, work = sys.argv[1], Path(sys.argv[2])
options = {"layer": 3, "check_tokens": 256, "max_degradation": 1000.0}
for fold in sys.argv[3].split(","):
    out = work / fold
    surgery.convert(source, fold=fold, output=out, **options)
    more = {"overwrite": True, "undo_file": fold != "norm"}
    surgery.convert(source, fold=fold, output=out, **more, **options)
    assert surgery.verify(out).passed
    surgery.revert(out, output=work / f"{fold}-reverted")
surgery.convert(source, fold="sink", form="adapter", output=work / "adapter", **options)
"""


@pytest.mark.parametrize("folds", ["qkv", pytest.param("qkv,norm,sink", marks=pytest.mark.full)])
def test_convert_verify_and_revert(
    folds: str, tiny: Tiny, tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte what this system writes with all that it has, and nothing is left beside."""
    source = tiny("llama", shards=3)
    job = tmp_path / "job.py"
    job.write_text(_JOB)
    done = without(str(job), str(source), str(tmp_path / "without"), folds)
    assert done.returncode == 0, done.stderr
    # With all that there is, in this process.
    monkeypatch.setattr(sys, "argv", ["job", str(source), str(tmp_path / "with"), folds])
    exec(_JOB.replace("import as_on_windows\n", ""), {})
    found = snapshot(tmp_path / "without")
    assert found == snapshot(tmp_path / "with")
    assert {name.split("/")[0] for name in found} >= {"qkv", "qkv-reverted", "adapter"}
    assert not [name for name in found if name.startswith(".")]


BYTES = (
    "tests/files/test_dtypes.py",
    "tests/files/test_checkpoint.py",
    "tests/outputs/test_plan_write.py",
)
# What is about the calls that are hidden here; and an interrupt while a file is patched, after which
# the temporary folder stays for the next run to remove where an open file cannot be.
ABOUT_THEM = (
    "not (calls_that_copy or copying_by or short_reads or write_back or umask or pipe or wrong_is"
    " or disk_that_fails_is_not_asked or (end_is_prompt and patching))"
)


@pytest.mark.full
def test_the_tests_of_bytes() -> None:
    done = without(
        # What is captured must be in memory: pytest removes the file of it while it is open.
        *("-m", "pytest", "-q", "--capture=sys", "-p", "as_on_windows"),
        *("-p", "no:cacheprovider"),
        *("-k", ABOUT_THEM, *BYTES),
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.full  # three processes; in one, `test_two_in_one_folder`
def test_a_lock_beside_the_folder(tmp_path: Path) -> None:
    """Held by a process, it keeps others out; killed, it lets them clean up."""
    code = (
        "import sys, time\nimport as_on_windows\nfrom pathlib import Path\n"
        "from surgery.files.staging import temporary_sibling, held\n"
        "with temporary_sibling(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'x').write_bytes(b'x')\n"
        "    with held(Path(sys.argv[1]).parent):\n"
        "        print(folder, flush=True)\n"
        "        time.sleep(60)\n"
    )
    other = (
        "import sys\nimport as_on_windows\nfrom pathlib import Path\n"
        "from surgery.errors import BadSettings\n"
        "from surgery.files.staging import held, remove_stale\n"
        "remove_stale(Path(sys.argv[1]))\n"
        "try:\n"
        "    with held(Path(sys.argv[1]).parent): print('alone')\n"
        "except BadSettings as error: print(error)\n"
    )
    output = tmp_path / "work" / "out"
    path = os.pathsep.join([str(ROOT), str(HERE)])
    words = (sys.executable, "-c", code, output)
    process = script.start(*words, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": path})
    try:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.suffix == ".part"
        done = without("-c", other, str(output))
        assert "Another process is working" in done.stdout, done.stderr
        assert (folder / "x").is_file()
    finally:
        process.kill()
        process.wait()
    done = without("-c", other, str(output))
    assert done.stdout.strip() == "alone", done.stderr
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("system", ["this", "without fcntl"])
def test_two_in_one_folder(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    if system != "this":
        monkeypatch.setattr(locks, "fcntl", None)
    for _ in range(2):
        with locks.locked(folder) as sure:
            assert sure
            with pytest.raises(BadSettings, match="Another process is"), staging.held(folder):
                pass
    assert list(tmp_path.iterdir()) == [folder]


# ---------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["..\\x", "a\\b", "\\x", "C:x", "a/b", "../x", "/x", "", "..", "x\n"]
)
def test_names_that_lead_elsewhere_on_some_system(name: str) -> None:
    assert not paths.is_plain_name(name)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "Übung 1"]
)
def test_names_that_stay(name: str) -> None:
    assert paths.is_plain_name(name)


@pytest.mark.parametrize("typed", ["C:\\models\\none", "models\\none", ".\\none", "\\\\host\\none"])
def test_no_folder_with_backslashes_is_looked_for_on_the_hub(typed: str) -> None:
    with pytest.raises(BadCheckpoint, match=f"^{re.escape(typed)} is neither an existing folder"):
        surgery.resolve(typed)


def test_backslashes_in_the_names_of_source_and_output(tiny_copy: Tiny, tmp_path: Path) -> None:
    source = tiny_copy()
    renamed = source.rename(tmp_path / "models\\tiny")
    output = tmp_path / "out\\tiny"
    surgery.convert(str(renamed), layer=3, check=False, output=output)
    assert surgery.verify(output).passed


def test_two_spellings_of_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where capitals make no difference: two names, one folder, and neither is resolved."""
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "MODEL").symlink_to(tmp_path / "model")
    monkeypatch.setattr(Path, "resolve", lambda self, strict=False: self.absolute())
    source = tmp_path / "model"
    with pytest.raises(BadSettings, match="the source itself"):
        check_apart([source], tmp_path / "MODEL")
    for one, other in (
        ("model", "MODEL/deep/out"),
        ("MODEL", "model/out"),
        ("MODEL/deep", "model"),
    ):
        with pytest.raises(BadSettings, match="inside one another"):
            check_apart([tmp_path / one], tmp_path / other)
    check_apart([source], tmp_path / "modest" / "out")


@pytest.mark.parametrize(("asked", "expected"), [(143, 143), (-1, 255), (None, 255)])
def test_the_longest_name(
    asked: int | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked is None:
        monkeypatch.delattr(os, "pathconf")
    else:
        monkeypatch.setattr(os, "pathconf", lambda *_: asked)
    assert paths.longest_name(tmp_path) == expected


# ---------------------------------------------------------------------------------------------
# What `files` may import
# ---------------------------------------------------------------------------------------------


def test_files_import_neither_torch_nor_transformers_nor_click() -> None:
    """Nor anything of surgery but errors: at the top of a module or within a function."""
    for module in sorted((ROOT / "surgery" / "files").glob("*.py")):
        text = module.read_text(encoding="utf-8")
        for name in re.findall(r"^\s*(?:from|import)\s+([\w.]+)", text, re.M):
            assert name.partition(".")[0] not in ("torch", "transformers", "click"), module
            if name.startswith("surgery"):
                assert name.startswith(("surgery.files", "surgery.errors")), (module, name)
