"""The page in a real browser, where there is one: nothing is cut off, and no text is too small to read.

Without Chromium this is skipped; test_page.py checks what can be checked without.
"""

import json
import os
import re
import shutil
import subprocess
from html import unescape

import pytest

from elsa_modifier.reporting.command import run
from tests.reporting.conftest import BENCH, EVALUATION

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

# A frame is as wide as it is told to be; a window of Chromium is not.
MEASURE = """<!DOCTYPE html><body><iframe src="PAGE" width="WIDTH" height="900"></iframe><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const texts = [...page.querySelectorAll("svg text")].map(
    text => {
    const matrix = text.getScreenCTM();  // of text that may stand upright
    return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(matrix.a, matrix.b);
  });
  const boxes = [...page.querySelectorAll("figure, figure svg, .tile, h1, h2, p")].map(
    box => box.getBoundingClientRect());
  const inside = [...page.querySelectorAll("svg text")].filter(text => {
    const own = text.getBoundingClientRect(), frame = text.closest("svg").getBoundingClientRect();
    return own.left < frame.left - 1 || own.right > frame.right + 1 || own.bottom > frame.bottom + 1;
  }).map(text => text.textContent);
  const scrolled = [...page.querySelectorAll(".scroll, pre")].filter(box => box.scrollWidth > box.clientWidth);
  document.title = JSON.stringify({
    scrolled: scrolled.map(box => box.closest("section").querySelector("h2").textContent),
    width: root.clientWidth, scroll: root.scrollWidth, texts: texts.length, smallest: Math.min(...texts),
    right: Math.max(...boxes.map(box => box.right)), empty: boxes.filter(box => !box.height).length, cut: inside,
  });
};
</script>"""


def chromium(*arguments):
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ, check=True).stdout


@pytest.fixture
def page(pruned_run):
    EVALUATION.write(pruned_run)
    (pruned_run / "elsa_bench.json").write_text(json.dumps(BENCH))
    return run(pruned_run, [pruned_run.with_name("out-0.5")], progress=False).page


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_cut_off_or_too_small(width, page, tmp_path):
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.replace("PAGE", page.as_uri()).replace("WIDTH", str(width)))
    dom = chromium("--dump-dom", "--virtual-time-budget=5000", frame.as_uri())
    found = json.loads(unescape(re.search(r"<title>(.*?)</title>", dom)[1]))
    assert width - 20 <= found["width"] <= width and found["scroll"] == found["width"] >= found["right"]
    assert found["texts"] > 50 and found["smallest"] >= 12 and found["empty"] == 0
    assert found["cut"] == [] and not {"Size", "Speed", "Serve it"} & set(found["scrolled"])


def test_it_prints(page, tmp_path):
    chromium("--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}", page.as_uri())
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
