"""The pages in a real browser: they render, without a console message, a request or a part wider than the window.

Chromium is driven through its command line. A script added to a copy of the page tells what was laid out.
"""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest

from fastlora.continual.compare import group_runs
from fastlora.continual.compare_page import write_comparison
from fastlora.continual.config import LoRAConfig, ZeroShotConfig
from fastlora.continual.report import write_report
from fastlora.continual.saved_run import read_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--headless=new",
    "--disable-gpu",
    "--no-sandbox",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=5000",
    "--dump-dom",
]
PROBE = """<script>addEventListener("load", () => {
const all = [...document.images], page = document.documentElement;
const seen = {width: innerWidth, wide: page.scrollWidth, height: page.scrollHeight};
seen.images = all.map(image => image.naturalWidth); seen.shown = all.map(image => image.clientWidth);
seen.headings = [...document.querySelectorAll("h1, h2")].map(heading => heading.innerText);
seen.paper = getComputedStyle(document.body).backgroundColor;
parent.postMessage(JSON.stringify(seen), "*"); })</script>"""
# a window has a least width, a frame has not
FRAME = """<!doctype html><script>addEventListener("message", message => {
const told = document.createElement("pre");
told.id = "seen"; told.textContent = message.data; document.body.append(told); })</script>
<body><iframe src="page.html" width="{width}" height="900" style="border: 0"></iframe></body>"""


@dataclass
class Visit:
    """What the page looked like, what it said on the console, and what it asked the network for."""

    seen: dict
    console: list
    requests: list


def visit(browser, page, folder, width=1200, *flags):
    frame, log = folder / "frame.html", folder / "net.json"
    (folder / "page.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    frame.write_text(FRAME.replace("{width}", str(width)))
    command = [browser, *FLAGS, *flags, "--window-size=1400,1000", f"--log-net-log={log}"]
    command += [f"--user-data-dir={folder / 'profile'}", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    network = json.loads(log.read_text())
    kinds = {number: name for name, number in network["constants"]["logEventTypes"].items()}
    started = [
        event.get("params", {}) for event in network["events"] if kinds[event["type"]] == "URL_REQUEST_START_JOB"
    ]
    # the browser's own requests come from no origin, those of a page from its own or an opaque one
    requests = [params["url"] for params in started if params.get("initiator", "not an origin") != "not an origin"]
    return Visit(
        json.loads(html.unescape(seen[1])) if seen else None,
        [line for line in done.stderr.splitlines() if re.search(r":CONSOLE[:(]", line)],
        [url for url in requests if not url.startswith("data:")],
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is on PATH")
    try:
        empty = visit(found, "<!doctype html><body><h1>hello</h1></body>", tmp_path_factory.mktemp("empty"))
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        pytest.skip(f"needs a browser that starts: {found} gave {type(error).__name__}: {error}")
    if empty.seen is None or empty.seen["headings"] != ["hello"]:
        pytest.skip(f"needs a browser that opens a local file; {found} does not")
    return found


def check(browser, page, folder, images, headings):
    """The page, on a desk and on a phone."""
    for width in (1200, 400):
        visited = visit(browser, page, folder, width)
        seen = visited.seen
        assert seen["width"] == width and seen["wide"] <= width
        assert len(seen["images"]) == images and min(seen["images"]) > 300 and min(seen["shown"]) > 300
        assert [heading for heading in headings if heading not in " / ".join(seen["headings"])] == []
        assert visited.console == [] and visited.requests == []


@pytest.mark.slow
def test_report(browser, make_run, tmp_path):
    run = make_run(null_model={"total_shrink": 0.65, "survival": 0.516, "expected_rank": 2.06})
    comparison = {"name": "same gates, other data", "jaccard": 0.99, "chance": 0.35, "per_module": {"a": [0.9, 0.3]}}
    (run / "selection.json").write_text(json.dumps({"comparisons": [comparison]}))
    metrics = json.loads((run / "metrics.json").read_text()) | {"drift_curve": [0.0, 1.0, 1.5]}
    (run / "metrics.json").write_text(json.dumps(metrics))
    page = write_report(run).read_text()
    headings = ["codyra on tiny, seed 0", "Figures", "Plasticity against stability", "Drift", "Time", "Configuration"]
    check(browser, page, tmp_path, 8, headings)
    light, dark = visit(browser, page, tmp_path), visit(browser, page, tmp_path, 1200, "--force-dark-mode")
    assert light.seen["paper"] == "rgb(255, 255, 255)" and dark.seen["paper"] == "rgb(22, 24, 29)"


@pytest.mark.slow
def test_comparison(browser, make_run, tmp_path):
    configs = [LoRAConfig(rank=rank, iterations=20) for rank in (1, 2, 4)] + [ZeroShotConfig()]
    groups = group_runs([read_run(make_run(str(i), method=config)) for i, config in enumerate(configs)])
    page = write_comparison(groups, tmp_path / "page.html").read_text()
    headings = ["4 settings on tiny", "The frontier, own label space", "What is left", "Accuracy tables", "Runs"]
    check(browser, page, tmp_path, 5, headings)


def test_a_bad_page_is_found_out(browser, tmp_path):
    """What the two tests above rest on: each fault shows."""
    faults = {
        "broken": '<img alt="" src="data:image/png;base64,iVBORw0KGgo=">',
        "fetches": '<link rel="stylesheet" href="https://example.org/a.css">',
        "fails": "<script>missing()</script>",
        "wide": '<table><tr><td style="min-width: 600px">wide</td></tr></table>',
    }
    visited = visit(browser, f"<!doctype html><body><h1>bad</h1>{''.join(faults.values())}</body>", tmp_path, 400)
    assert visited.seen["images"] == [0] and visited.seen["wide"] > visited.seen["width"] == 400
    assert len(visited.console) >= 1 and any("missing is not defined" in line for line in visited.console)
    assert visited.requests == ["https://example.org/a.css"]
