"""`surgery analyze --report`: the page, its figures and numbers; models side by side."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from shared import rest_in_full

import surgery
from surgery.method import evidence
from surgery.report import numbers
from surgery.report import page as report

PNG = b"\x89PNG\r\n\x1a\n"
FIGURES = [
    "layers.png",
    "parts.png",
    "alignment.png",
    "ffn.png",
    "stability.png",
    "direction.png",
    "knockouts.png",
    "attention.png",
    "heatmaps.png",
    "mask.png",
]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None
)


class Page(html.parser.HTMLParser):
    """What a page says and refers to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def images(self):
        found = [v for tag, name, v in self.attributes if (tag, name) == ("img", "src")]
        return [base64.b64decode(v.removeprefix("data:image/png;base64,")) for v in found]


@pytest.fixture(scope="module")
def analysis(tiny):
    return surgery.analyze(str(tiny("qwen3")), evidence=True)


@pytest.fixture(scope="module")
def folder(analysis, tmp_path_factory):
    found = tmp_path_factory.mktemp("reports") / "report"
    report.write_report(analysis, found, {"models": ["tiny"], "rate": 0.1})
    return found


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture
def quick_figures(folder, monkeypatch):
    """For tests that do not look at the figures: some picture in place of each."""
    picture = (folder / "layers.png").read_bytes()

    def draw(*words, **_options):
        (path,) = (word for word in words if isinstance(word, Path))
        path.write_bytes(picture)

    monkeypatch.setattr(report, "_PIECES", [(*piece[:-1], draw) for piece in report._PIECES])
    monkeypatch.setattr(report, "plot_layers", draw)


# --------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------


def test_files(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([*FIGURES, "index.html", "report.json"])
    assert not list(folder.parent.glob(".report*")), "the temporary folder is gone"


def test_figures_are_pictures_and_in_the_page(folder, page):
    from PIL import Image

    embedded = page.images()
    assert len(embedded) == len(FIGURES)
    for name in FIGURES:
        raw = (folder / name).read_bytes()
        assert raw.startswith(PNG)
        assert raw in embedded
        with Image.open(io.BytesIO(raw)) as picture:
            assert picture.width > 600
            assert len(picture.convert("RGB").getcolors(2**24)) > 10, f"{name} is empty"
            assert "Software" not in picture.info


def test_page_needs_nothing_else(page):
    assert "script" not in page.tags
    assert "link" not in page.tags
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data"):
            assert str(value).startswith("data:"), (tag, name)
        assert not name.startswith("on"), (tag, name)
    assert ("meta", "name", "viewport") in page.attributes


def test_page_says_what_was_found(page, analysis):
    assert "Massive activations in tiny-qwen3" in page.text
    assert "Massive Emergence Layer 3" in page.text
    for trace in analysis.evidence.traces:
        assert " ".join(trace.prompt.text.split()) in page.text
    assert "What could not be measured" in page.text
    assert "transformers" in page.text
    assert "nan" not in page.text.lower().split()


def test_every_picture_has_words(page):
    words = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(words) == len(FIGURES)
    assert all(len(text) > 40 for text in words)


def test_page_escapes_what_strangers_write(analysis, quick_figures, tmp_path):
    from dataclasses import replace

    trace = analysis.evidence.traces[0]
    hostile = replace(
        trace, prompt=replace(trace.prompt, text="<script>alert(1)</script>", kind="<b>bold")
    )
    changed = replace(
        analysis,
        evidence=replace(analysis.evidence, traces=(hostile, *analysis.evidence.traces[1:])),
    )
    report.write_report(changed, tmp_path / "hostile", {"models": ["<img src=x>"]})
    page = Page((tmp_path / "hostile" / "index.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.tags.count("img") == len(FIGURES)


# --------------------------------------------------------------------------------------------
# The numbers
# --------------------------------------------------------------------------------------------


def test_json_agrees_with_the_evidence(data, analysis):
    found = data["evidence"]
    assert data["emergence"]["layer"] == 3
    assert data["targets"]["first"] == [4]
    traces = analysis.evidence.traces
    for row in found["layers"]:
        layer = row["layer"]
        magnified = [evidence.magnification(t.output, t.sink)[layer] for t in traces]
        assert row["magnification"] == pytest.approx(np.median(magnified), rel=1e-5)
        for name, field in (("delta_fraction", "fraction"), ("delta_kl", "divergence")):
            values = [evidence.sink_minus_others(getattr(t, field), t.sink)[layer] for t in traces]
            assert row[name] == pytest.approx(np.median(values), rel=1e-5)
        for role in ("gate", "up", "down"):
            values = [evidence.sink_minus_others(getattr(t, role), t.sink)[layer] for t in traces]
            assert row[role] == pytest.approx(np.median(values), rel=1e-5)
    states = np.stack([trace.states[4].astype(np.float64) for trace in traces])
    np.testing.assert_allclose(found["cosines"][4], evidence.cosines(states), rtol=1e-5)
    assert [prompt["tokens"] for prompt in found["prompts"]] == [
        vote["tokens"] for vote in data["emergence"]["votes"]
    ]
    assert found["mask"]["layer"] == 4
    assert [knockout["part"] for knockout in found["knockouts"]] == ["ffn", "norm"]
    assert data["versions"]["torch"]
    assert data["settings"] == {"models": ["tiny"], "rate": 0.1}


def test_json_is_strict_and_of_moderate_size(folder):
    raw = (folder / "report.json").read_text()

    def refuse(word):
        raise AssertionError(word)

    json.loads(raw, parse_constant=refuse)
    assert len(raw) < 300_000


def test_rounded():
    found = numbers.rounded({"a": np.array([1 / 3]), "b": (2, True, None, "x"), 3: 1e-20 / 3})
    assert found == {"a": [0.333333], "b": [2, True, None, "x"], "3": 3.33333e-21}


# --------------------------------------------------------------------------------------------
# The folder
# --------------------------------------------------------------------------------------------


def test_an_earlier_report_is_replaced(folder, analysis, quick_figures, tmp_path):
    copy = tmp_path / "report"
    shutil.copytree(folder, copy)
    (copy / "stale.png").write_bytes(PNG)
    report.write_report(analysis, copy, {})
    assert not (copy / "stale.png").exists()
    assert (copy / "index.html").is_file()


def test_an_empty_folder_is_used(analysis, quick_figures, tmp_path):
    (tmp_path / "deep" / "empty").mkdir(parents=True)
    report.write_report(analysis, tmp_path / "deep" / "empty", {})
    assert (tmp_path / "deep" / "empty" / "report.json").is_file()


@pytest.mark.parametrize("name", ["notes.txt", "figure.png", "model.safetensors", "sub"])
def test_other_folders_are_refused_before_any_work(name, run, tmp_path, snapshot):
    target = tmp_path / "mine"
    target.mkdir()
    if name == "sub":
        (target / name).mkdir()
    else:
        (target / name).write_text("precious")
    before = snapshot(target)
    outcome = run("analyze", tmp_path / "no-such-model", "--report", target)
    assert outcome.code == 2
    assert "not an earlier report" in outcome.sentence()
    assert snapshot(target) == before


def test_a_report_with_other_files_in_it_is_refused(folder, tmp_path):
    copy = tmp_path / "report"
    shutil.copytree(folder, copy)
    (copy / "notes.txt").write_text("precious")
    with pytest.raises(surgery.SurgeryError, match=r"notes\.txt"):
        report.check_folder(copy)


def test_nothing_is_left_when_drawing_fails(analysis, tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("no")

    monkeypatch.setattr(report.plots, "drawing", fail)
    with pytest.raises(RuntimeError):
        report.write_report(analysis, tmp_path / "report", {})
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------


def test_command_keeps_its_json_and_writes_the_report(run, tiny, quick_figures, tmp_path):
    target = tmp_path / "report"
    outcome = run("analyze", tiny("qwen3"), "--report", target, "--json").ok()
    keys = [
        *("model", "commit", "model_type", "anatomy", "depth", "hidden_size", "emergence"),
        *("targets", "streamed"),
    ]
    assert list(outcome.json()) == keys
    written = json.loads((target / "report.json").read_text())
    assert {key: written[key] for key in keys} == outcome.json()


def test_evidence_in_the_terminal_only_when_asked(run, tiny):
    quick = run("analyze", tiny("qwen3")).ok().stdout
    full = run("analyze", tiny("qwen3"), "--evidence").ok().stdout
    assert "ΔFrac" not in quick
    for heading, _, _ in numbers.COLUMNS[3:]:
        assert heading in full
    data = run("analyze", tiny("qwen3"), "--evidence", "--json").ok().json()
    assert len(data["evidence"]["layers"]) == 8


def test_rate_reaches_the_evidence(run, tiny):
    words = ("analyze", tiny("qwen3"), "--evidence", "--json", "--rate")
    data = run(*words, 0.25).ok().json()
    assert data["evidence"]["share"] == 0.25
    assert len(data["evidence"]["mask"]["dimensions"]) == 16
    assert run(*words, 1.5).code == 2


def test_without_emergence_the_report_is_written_and_the_exit_code_says_so(run, tiny, tmp_path):
    outcome = run("analyze", tiny("llama", planted=False), "--report", tmp_path / "report")
    assert outcome.code == 3
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert "No Massive Emergence Layer." in page.text
    assert not (tmp_path / "report" / "knockouts.png").exists()


@pytest.mark.parametrize(
    "family", rest_in_full(["mixtral", "cohere", "gpt2", "gemma2"], ["mixtral", "gpt2"])
)
def test_other_families(family, run, tiny, tmp_path):
    run("analyze", tiny(family), "--report", tmp_path / "report", "--quiet").ok()
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert "Massive Emergence Layer 3" in page.text
    assert "What could not be measured" in page.text


def test_models_side_by_side(run, tiny, tmp_path):
    models = [tiny("qwen3"), tiny("llama", planted=False), tiny("gemma2", layer=5)]
    target = tmp_path / "report"
    outcome = run("analyze", *models, "--report", target).ok()
    lines = outcome.stdout.splitlines()
    (none,) = (line for line in lines if "tiny-llama" in line)
    assert "none found" in none
    (five,) = (line for line in lines if "tiny-gemma2" in line)
    assert re.search(r"\b5 +×", five)
    page = Page((target / "index.html").read_text(encoding="utf-8"))
    assert "Massive activations in 3 models" in page.text
    assert "none found" in page.text
    assert len(page.images()) == 1
    data = json.loads((target / "report.json").read_text())
    assert [model["emergence"]["layer"] for model in data["models"]] == [3, None, 5]


def test_comparison_without_report(run, tiny, tmp_path):
    models = [tiny("qwen3"), tiny("qwen3", layer=4)]
    data = run("analyze", *models, "--json", "--plot", tmp_path / "both.png").ok().json()
    assert [model["emergence"]["layer"] for model in data["models"]] == [3, 4]
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)
    assert run("analyze", *models, "--evidence").code == 2


def test_a_model_that_fails_is_a_row_and_the_exit_code(run, tiny, tmp_path):
    missing = tmp_path / "missing"
    outcome = run("analyze", missing, tiny("qwen3"), "--report", tmp_path / "report")
    assert outcome.code == 7
    assert "not analysed" in outcome.stdout
    assert "tiny-qwen3" in outcome.stdout
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert f"{missing} is neither an existing folder" in page.text


def test_a_streamed_model_keeps_its_depth_in_the_comparison(run, tiny, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report.plots, "plot_comparison", lambda found, path: drawn.update(found))
    models = [tiny("qwen3", layers=16), tiny("gemma2", layer=5)]
    run("analyze", *models, "--stream", "--report", tmp_path / "report").ok()
    (streamed, depth), (_, other) = drawn.values()
    assert (depth, other) == (16, 8)
    assert len(streamed.rows) < depth


# --------------------------------------------------------------------------------------------
# In a browser
# --------------------------------------------------------------------------------------------

# The report has no scripts; this page looks into it from outside.
_WATCHER = """<!doctype html><title>watcher</title>
<iframe id="phone" src="{url}" width="390" height="800"></iframe>
<iframe id="desk" src="{url}" width="1200" height="800"></iframe>
<pre id="found">waiting</pre>
<script>
window.onload = () => {{
  const seen = {{}};
  for (const id of ["phone", "desk"]) {{
    const view = document.getElementById(id).contentWindow, page = view.document;
    seen[id] = {{
      title: page.title,
      widths: [...page.images].map(image => image.naturalWidth),
      shown: [...page.images].map(image => image.clientWidth),
      overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
      requests: view.performance.getEntriesByType("resource").map(entry => entry.name)
        .filter(name => !name.startsWith("data:")),
    }};
  }}
  document.getElementById("found").textContent = JSON.stringify(seen);
}};
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_in_a_browser(folder, tmp_path):
    watcher = tmp_path / "watcher.html"
    watcher.write_text(_WATCHER.format(url=(folder / "index.html").as_uri()))
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        # Any request to a network fails: nothing listens on this port, and no name resolves.
        *("--proxy-server=127.0.0.1:9", "--host-resolver-rules=MAP * ~NOTFOUND"),
        # Lets the watcher look into the report, both of them files.
        *("--disable-web-security", "--allow-file-access-from-files"),
        *("--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"),
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [str(CHROMIUM), *flags, watcher.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    match = re.search(r'<pre id="found">(\{.*\})</pre>', done.stdout)
    assert match, done.stdout[-2000:] + done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    for name, seen in json.loads(match[1].replace("&amp;", "&")).items():
        assert seen["title"] == "Massive activations in tiny-qwen3"
        assert len(seen["widths"]) == len(FIGURES)
        assert min(seen["widths"]) > 0
        assert max(seen["shown"]) <= (390 if name == "phone" else 1000)
        assert min(seen["shown"]) > 300
        assert seen["overflow"] <= 0, "the page does not scroll sideways"
        assert seen["requests"] == []
