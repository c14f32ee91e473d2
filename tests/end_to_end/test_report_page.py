"""The report page in a real browser: it draws something, and fits a laptop and a phone."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from report_data import bare_run, make_run, talking_run

from rlsf_ray.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]

# The report runs no script, so a page around it measures it: a frame of the given width, then two numbers as title.
FRAME = """<!DOCTYPE html><title>not loaded</title><script>
function measure(frame) {{ const root = frame.contentDocument.documentElement;
  document.title = root.scrollWidth + " of " + root.clientWidth; }}
</script><iframe width="{width}" height="900" onload="measure(this)" srcdoc="{page}"></iframe>"""


def browse(folder: Path, *arguments: str) -> str:
    """What Chromium prints, with a profile of its own."""
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module", params=[make_run, bare_run, talking_run])
def report(request, tmp_path_factory) -> Path:
    return Path(write_report(request.param(str(tmp_path_factory.mktemp("run")))))


def test_the_page_is_drawn(report, tmp_path):
    picture = tmp_path / "page.png"
    browse(tmp_path, "--window-size=1200,900", f"--screenshot={picture}", report.as_uri())
    pixels = imread(picture)[..., :3]
    assert pixels.shape[1] == 1200
    assert np.median(pixels) > 0.9  # a light background
    assert np.mean(pixels < 0.4) > 0.002  # with text on it


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(report, tmp_path, width):
    page = tmp_path / "frame.html"
    quoted = html.escape(report.read_text(encoding="utf-8"))
    page.write_text(FRAME.format(width=width, page=quoted), encoding="utf-8")
    found = re.search(r"<title>(\d+) of (\d+)</title>", browse(tmp_path, "--dump-dom", page.as_uri()))
    assert found, "the frame was not measured"
    content, window = map(int, found.groups())
    assert content <= window <= width
