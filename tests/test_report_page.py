"""The pages in a real browser: no request, no complaint, nothing beyond the screen, readable on light and dark ground.

Chromium is driven by its command line. A copy of the page with a script measures; the page itself has none, and its
policy would not let one run.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import support
from bitwright.calibration import Text
from bitwright.report import activations, figures

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")

MEASURE = """
<script>
addEventListener("load", () => {
  const seen = e => getComputedStyle(e);
  const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll > table") && !e.closest("svg")
      && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80));
  const texts = [...document.querySelectorAll("figure svg text")];
  const out = {
    inner: innerWidth,
    scroll: document.documentElement.scrollWidth,
    wide,
    figures: [...document.querySelectorAll("figure svg")].map(e => {
      const box = e.getBoundingClientRect();
      return [e.getAttribute("aria-label"), box.width, box.height];
    }),
    smallest: Math.min(...texts.map(e => e.getBoundingClientRect().height)),
    outside: texts.filter(e => { const a = e.getBoundingClientRect(), b = e.closest("svg").getBoundingClientRect();
      return a.left < b.left - 1 || a.right > b.right + 1; }).map(e => e.textContent),
    body: [seen(document.body).color, seen(document.body).backgroundColor],
    figure: [seen(texts[0]).fill, seen(document.querySelector("figure")).backgroundColor],
    duplicates: [...document.querySelectorAll("[id]")].map(e => e.id).filter((id, i, all) => all.indexOf(id) != i),
    missing: [...document.querySelectorAll("use")].map(e => e.href.baseVal)
      .filter(href => !document.getElementById(href.slice(1))),
  };
  parent.postMessage(JSON.stringify(out), "*");
});
</script>
"""

# Windows have a least width above that of a phone; frames have none.
FRAME = """
<!doctype html>
<style>:root {{ color-scheme: {scheme}; }} iframe {{ width: {width}px; height: 900px; border: 0; }}</style>
<pre id="measured"></pre>
<script>addEventListener("message", e => document.getElementById("measured").textContent = e.data);</script>
<iframe src="measured.html"></iframe>
"""


def chromium(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    profile = page.with_name("profile")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *flags)
    done = subprocess.run(
        [str(CHROMIUM), *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def complaints(page: Path) -> list[str]:
    """What the browser writes to the console: errors of the page, and requests that its policy stopped."""
    return [line for line in chromium(page).stderr.splitlines() if "CONSOLE" in line]


def measured(page: Path, scratch: Path, width: int, dark: bool) -> Any:
    text = page.read_text()
    without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert without != text
    copy = scratch / "measured.html"
    copy.write_text(without.replace("</body>", MEASURE + "</body>"))
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    frame = scratch / "frame.html"
    frame.write_text(FRAME.format(width=width, scheme="dark" if dark else "light"))
    dom = chromium(frame, "--window-size=1400,1000", "--virtual-time-budget=5000", scheme).stdout
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    assert found
    assert found[1], "the page did not load in its frame"
    return json.loads(html.unescape(found[1]))


def contrast(colours: list[str]) -> float:
    """Contrast ratio of two `rgb(...)` colours (WCAG 2)."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


MIXED = '{"*.mlp.*": {"bits": 3, "outliers": 0}, "*.o_proj": {"group": 64}}'


@pytest.fixture(scope="module")
def compared(
    models: dict[str, Path], calibration_file: Path, evaluation_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The page of a comparison with a long label, four methods that order channels and two texts."""
    root = tmp_path_factory.mktemp("page")
    second = root / "a-text-with-a-rather-long-name-<b>&.txt"
    second.write_text(support.words(1500, 13))
    outcome = support.run_cli(
        *("compare", models["llama"], "--calib", calibration_file, "--out", root / "out"),
        *("--methods", "original,rtn,wgm,bwa,bwa:weights.feedback=column,weights.levels=dp,weights.order=descending"),
        *("--methods", f"bwa:sites={MIXED}"),
        *("--text", evaluation_file, "--text", second),
        *("--sequences", "2", "--length", "48", "--window", "48", "--windows", "2"),
    )
    assert outcome.code == 0, outcome.err
    return root / "out" / "report.html"


@pytest.fixture(scope="module")
def of_artifact(
    artifact: Callable[..., Path],
    models: dict[str, Path],
    calibration_file: Path,
    evaluation_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The page of an artifact with all that can be measured for it."""
    page = tmp_path_factory.mktemp("page") / "artifact.html"
    outcome = support.run_cli(
        *("report", artifact(options={"sites": json.loads(MIXED)}), "--out", page),
        *("--model", models["llama"], "--calib", calibration_file),
        *("--text", evaluation_file, "--text", calibration_file, "--window", "48", "--windows", "2"),
    )
    assert outcome.code == 0, outcome.err
    return page


def test_a_page_stands_alone(compared: Path, of_artifact: Path) -> None:
    for page in (compared, of_artifact):
        text = page.read_text()
        assert "<script" not in text
        assert not [link for link in re.findall(r'(?:src|href)="([^"]*)"', text) if not re.match("#|data:", link)]
        assert len(text) < 1_500_000
    assert "a-text-with-a-rather-long-name-&lt;b&gt;&amp;.txt" in compared.read_text()
    assert "<b>&" not in compared.read_text()
    widths = re.findall(r'data-name="W/A/KV bits">([^<]*)<', compared.read_text())
    assert widths == ["32/16/16", "2/4/4", "6/16/16", "2/4/4", "2/4/4", "2 to 3/4/4"]


def test_the_page_of_an_artifact_counts_as_plan_does(
    of_artifact: Path, artifact: Callable[..., Path], models: dict[str, Path]
) -> None:
    planned = support.run_cli("plan", models["llama"], "--set", f"sites={MIXED}", "--preset", "bwa", "--json").json
    cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", of_artifact.read_text())]
    for key in ("linear_weights", "linear_bytes", "parameters", "total_bytes"):
        assert f"{planned[key]:,}" in cells, key
    for key in ("linear_bits", "model_bits"):
        assert f"{planned[key]:.4f}" in cells, key
    made = artifact(options={"sites": json.loads(MIXED)})
    layers = json.loads((made / "bitwright_manifest.json").read_text())["layers"]
    assert "weights 2 to 3-bit, activations 4-bit, key-value cache 4-bit" in of_artifact.read_text()
    assert all(layer["linear"] in cells and f"{layer['error']:.5f}" in cells for layer in layers)


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("quarot", {"weights.group": 32}),
        ("gbs", {"weights.group": 32, "search.iterations": 1, "transform.expansion": "power"}),
        ("bwa", {"outer.embedding": 4, "outer.head": 4}),
        ("bitwright", {"allocate": None}),
    ],
)
def test_the_page_says_what_the_card_says(
    preset: str, options: dict[str, Any], artifact: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where a head is stored by itself, widths are filled up with zeros, or outer matrices are in integers."""
    made = artifact("qwen2", preset, options)
    assert support.run_cli("report", made, "--out", tmp_path / "page.html").code == 0
    cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", (tmp_path / "page.html").read_text())]
    card = (made / "README.md").read_text()
    of_linears = re.search(r"linears \(([\d,]+) weights\).*?\| ([\d.]+) a weight \| ([\d,]+) \|", card)
    of_model = re.search(r"whole model \(([\d,]+) parameters\).*?\| ([\d.]+) a parameter \| ([\d,]+) \|", card)
    assert of_linears
    assert of_model
    for name, said in (("quantized linears, all counted", of_linears), ("whole model, headers included", of_model)):
        at = cells.index(name)
        assert cells[at + 1 : at + 4] == [said[1], said[3], said[2]]
    for key, value in options.items():
        assert f"{key}={'none' if value is None else value}" in (tmp_path / "page.html").read_text()


def table(page: Path, title: str) -> list[list[str]]:
    """Cells of the table under a heading, its headings first."""
    found = re.search(rf"<h2>{title}</h2>(.*?)</table>", page.read_text(), re.DOTALL)
    assert found
    rows = re.findall(r"<tr>(.*?)</tr>", found[1], re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]


def test_what_is_measured_for_the_page_is_what_eval_and_compare_measure(
    of_artifact: Path,
    compared: Path,
    artifact: Callable[..., Path],
    models: dict[str, Path],
    evaluation_file: Path,
    calibration: Text,
) -> None:
    heading, first, second = table(of_artifact, "Quality, measured for this page")
    assert heading == ["text", "windows", "original", "quantized", "excess"]
    assert (first[:2], second[:2]) == (
        [evaluation_file.name, "2 × 48"],
        ["calibration.txt (calibrated on: flatters)", "2 × 48"],
    )
    made, losses, text = artifact(options={"sites": json.loads(MIXED)}), {}, of_artifact.read_text()
    for path, cell in ((models["llama"], first[2]), (made, first[3])):
        found = support.run_cli("eval", path, "--text", evaluation_file, "--window", "48", "--windows", "2", "--json")
        assert float(cell.replace(",", "")) == pytest.approx(found.json["perplexity"], abs=1)
        losses[path] = found.json["loss"]
    assert float(first[4]) == pytest.approx(losses[made] - losses[models["llama"]], abs=1e-3)
    assert found.json["protocol"] in html.unescape(text)
    assert text.count(f"sha256 {found.json['text_sha256']}") == 1
    # What a comparison draws of these models and this text (test_compare_activations.py says whether it is right).
    seen = activations.site_maxima(models["llama"], calibration)
    curves = activations.before(seen), activations.after(seen, made, calibration)
    before, after = ({int(key[0]): curve[key] for key in curve if key.endswith("/mlp_out")} for curve in curves)
    assert sorted(before) == sorted(after) == [0, 1]
    assert figures.activation_curves("activations0mlp_out", "mlp_out", before, after) in text
    assert text.count("As quantized by this artifact.") == 4
    section = re.search(r"<h2>Activations by channel</h2>\s*<p[^>]*>(.*?)</p>", text, re.DOTALL)
    assert section
    assert "on 8 random segments of 128 tokens of calibration.txt, measured for this page" in section[1]
    assert "ethods that keep" not in section[1]
    assert "Methods that keep the model's channels as they are" in html.unescape(compared.read_text())


def test_a_page_measures_no_more_than_it_is_asked_for(
    artifact: Callable[..., Path],
    models: dict[str, Path],
    evaluation_file: Path,
    calibration_file: Path,
    tmp_path: Path,
) -> None:
    page, plain = tmp_path / "page.html", artifact("mistral", "rtn")
    assert support.run_cli("report", plain, "--out", page).code == 0
    assert "measured for this page" not in page.read_text()
    assert "Activations by channel" not in page.read_text()
    assert support.run_cli("report", plain, "--out", page, "--text", evaluation_file, "--windows", "1").code == 0
    assert table(page, "Quality, measured for this page")[0] == ["text", "windows", "quantized"]
    assert "Activations by channel" not in page.read_text()
    # Channels that stay where they are: the original's curves alone, and why.
    kept = artifact("mistral", "bwa", {"weights.outliers": 0, "weights.order": "none"})
    both = support.run_cli("report", kept, "--out", page, "--model", models["mistral"], "--calib", calibration_file)
    assert both.code == 0, both.err
    assert "it has no curves of its own" in page.read_text()
    assert "as quantized" not in page.read_text()
    assert page.read_text().count('aria-label="largest activation') == 4


def test_clip_ratios_stand_under_settings(artifact: Callable[..., Path], tmp_path: Path) -> None:
    options = {"weights.group": 32, "weights.range": "minmax", "search.iterations": 1, "search.share": 0.02}
    made, page = artifact("llama", "gbs", options), tmp_path / "page.html"
    assert support.run_cli("report", made, "--out", page).code == 0
    for entry in json.loads((made / "bitwright_manifest.json").read_text())["search"]:
        said = f"<dt>{entry['target']}</dt><dd><code>{entry['ratio']:.5g}, after 2 evaluations</code></dd>"
        assert said in page.read_text()
    assert "searched by gbs" in page.read_text()


def test_what_cannot_be_measured_for_a_page_is_refused(
    artifact: Callable[..., Path], models: dict[str, Path], evaluation_file: Path, tmp_path: Path
) -> None:
    page, short = tmp_path / "page.html", tmp_path / "short.txt"
    short.write_text("Too short.")
    for options, message in (
        (["--calib", evaluation_file], "--calib is for the activations before and after, which need the original"),
        (["--model", models["llama"]], "--model has nothing to be measured on; add --text FILE"),
        (["--windows", "3"], "--window and --windows say how perplexity is measured; add --text FILE"),
        (["--model", models["llama_biases"], "--text", evaluation_file], "is not the model that"),
        (["--model", tmp_path / "none", "--text", evaluation_file], "there is no model directory"),
        (["--text", evaluation_file, "--text", short], "short.txt"),
        (["--text", evaluation_file, "--dtype", "int8"], "dtype 'int8' is not one of"),
    ):
        outcome = support.run_cli("report", artifact(), "--out", page, *options)
        assert outcome.code == 1
        assert message in outcome.message
        assert not page.exists()


def test_report_of_what_is_no_artifact(models: dict[str, Path], artifact_copy: Path, tmp_path: Path) -> None:
    assert "is no bitwright artifact" in support.run_cli("report", models["llama"]).message
    assert "there is no artifact directory" in support.run_cli("report", tmp_path / "none").message
    support.flip_bit(artifact_copy / "bitwright_manifest.json", 40)
    assert "bitwright_manifest.json" in support.run_cli("report", artifact_copy).message
    assert not artifact_copy.with_name("copy.html").exists()


@browser
def test_no_complaints_and_no_requests(compared: Path, of_artifact: Path, tmp_path: Path) -> None:
    assert complaints(compared) == []
    assert complaints(of_artifact) == []
    # That the browser does complain: the same page with a picture from elsewhere.
    asking = tmp_path / "asking.html"
    asking.write_text(compared.read_text().replace("</main>", '<img src="http://localhost:9/x.png"></main>'))
    assert any("Content Security Policy" in line for line in complaints(asking))


@browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_reads_well(compared: Path, of_artifact: Path, tmp_path: Path, width: int, dark: bool) -> None:
    maps = {"relative output error": 1, "honest bits": 1, "largest activation": 4}
    kinds = {"perplexity against": 2, "relative output error": 5, "honest bits": 1, "largest activation": 16}
    for page, expected in ((compared, kinds), (of_artifact, maps)):
        found = measured(page, tmp_path, width, dark)
        assert found["inner"] == width
        assert found["scroll"] <= width
        assert found["wide"] == []
        for kind, count in expected.items():
            drawn = [box for label, *box in found["figures"] if label.startswith(kind)]
            assert len(drawn) == count, kind
            assert all(box[0] > 280 and box[1] > 100 for box in drawn)
        assert len(found["figures"]) == sum(expected.values())
        assert found["smallest"] >= 9, "text of a figure is too small to read"
        assert found["outside"] == []
        assert found["duplicates"] == []
        assert found["missing"] == []
        assert contrast(found["body"]) > 7
        assert contrast(found["figure"]) > 7
        background = int(re.findall(r"\d+", found["body"][1])[0])
        assert background < 64 if dark else background > 192
