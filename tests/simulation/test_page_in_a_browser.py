"""Does a real browser draw the page about simulated days whole: each chart, nothing cut off, nothing fetched?"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import run_cli

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)")
DAY = ("--workload", "M-M", "--rate", "4", "--requests", "120", "--instances", "3", "--urgent", "0.2")
LOOK = """<script>
const inside = (a, b) =>
  a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
const charts = [...document.querySelectorAll("figure svg")];
const told = {
  fetched: performance.getEntriesByType("resource").length,
  width: document.documentElement.scrollWidth, window: innerWidth,
  charts: charts.length, empty: charts.filter(one => one.getBoundingClientRect().width < 100).length,
  lines: charts.map(one => [...one.querySelectorAll("path.l")].filter(it => it.getTotalLength() > 0).length),
  cut: charts.flatMap(one => [...one.querySelectorAll("text")].filter(
    it => !inside(it.getBoundingClientRect(), one.getBoundingClientRect())).map(it => it.textContent)),
  ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor,
};
document.title = JSON.stringify(told);
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    names = []
    for arm in ("dispatch", "ours"):
        assert run_cli(["simulate", "run", *DAY, "--arm", arm, "--out", str(folder / arm)]) == 0
        names.append(str(folder / arm / "result.json"))
    assert run_cli(["simulate", "report", *names, "--against", "dispatch", "--html", str(folder / "page.html")]) == 0
    return (folder / "page.html").read_text()


def look(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What a script that is put at its end finds."""
    assert BROWSER is not None
    (folder / "page.html").write_text(page.replace("</body>", f"{LOOK}</body>"))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},900"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *flags, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr
    found: dict[str, Any] = json.loads(unescape(title.group(1)))
    return found


@pytest.mark.parametrize("width", [1300, 600])
def test_every_chart_is_drawn_and_nothing_is_cut_off_or_fetched(page: str, width: int, tmp_path: Path) -> None:
    told = look(page, width, tmp_path)
    assert told["charts"] == page.count("<figure") > 8
    assert told["empty"] == 0 and all(told["lines"]), "a chart without a line"
    assert told["cut"] == [], "labels that do not fit"
    assert told["width"] <= told["window"], "it scrolls sideways"
    assert told["fetched"] == 0
    assert told["ink"] != told["paper"]
