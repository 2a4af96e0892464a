"""The table of tested versions: what pytest reported is what stands there, and the page shows the committed rows."""

import json
import re
import subprocess
import sys

import pytest
import versions

RESULT = json.loads(versions.RESULT.read_text())
REPORT = """<testsuites><testsuite name="pytest" tests="9" failures="2" errors="1" skipped="2" time="61.5">
<testcase classname="tests.a" name="fine"/>
<testcase classname="tests.a" name="wrong"><failure message="no"/></testcase>
<testcase classname="tests.b" name="worse"><error message="no"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(REPORT)
    return path


def entry(python, asked, passed=1):
    packages = dict.fromkeys(versions.PACKAGES, "1.0")
    figures = {"passed": passed, "failed": 0, "skipped": 2, "seconds": 3}
    return {"python": python, "asked": asked, **figures, "packages": packages, "date": "2026-01-01", "commit": "abc"}


def test_counts_of_a_report(report):
    assert versions.counts(report) == {
        **{"passed": 4, "failed": 3, "skipped": 2, "seconds": 62},
        "failures": ["tests.a.wrong", "tests.b.worse"],
    }


def test_a_row_replaces_that_of_the_same_python_and_wish():
    rows = versions.with_row([entry("3.10.1", "2.11"), entry("3.9.4", "newest")], entry("3.10.2", "2.11", passed=7))
    assert [(each["python"], each["passed"]) for each in rows] == [("3.9.4", 1), ("3.10.2", 7)]
    assert len(versions.with_row(rows, entry("3.10.2", "newest"))) == 3


def test_a_failure_is_noted_and_ends_the_command(report, tmp_path, monkeypatch):
    """The row is written first, so that what failed stands in the table."""
    page = tmp_path / "install.md"
    page.write_text("text\n\n<!-- versions -->\nold\n<!-- end of versions -->\n\nmore\n")
    monkeypatch.setattr(versions, "RESULT", tmp_path / "versions.json")
    monkeypatch.setattr(versions, "PAGE", page)
    note = ["note", "--asked", "newest", "--wheel", "x.whl", "--junit", str(report)]
    monkeypatch.setattr(sys, "argv", ["versions.py", *note])
    monkeypatch.setattr(versions, "commit", lambda: "abc1234")
    with pytest.raises(SystemExit, match="with torch newest: 3 tests failed"):
        versions.main()
    (row,) = json.loads((tmp_path / "versions.json").read_text())["rows"]
    assert row["failures"] == ["tests.a.wrong", "tests.b.worse"] and row["packages"]["torch"]
    assert versions.table([row]) in page.read_text() and "old" not in page.read_text()


def test_the_commit_is_dirty_when_a_source_is_changed(tmp_path, monkeypatch):
    def git(*command):
        who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "rows.json").write_text("{}")
    (tmp_path / "source.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    for name, file in (("RESULT", "rows.json"), ("PAGE", "page.md")):
        monkeypatch.setattr(versions, name, tmp_path / file)
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    (tmp_path / "rows.json").write_text("{1}")
    assert not versions.commit().endswith("-dirty")
    (tmp_path / "source.py").write_text("changed")
    assert versions.commit().endswith("-dirty")


def test_the_page_shows_the_rows():
    assert versions.table(RESULT["rows"]) in versions.PAGE.read_text()


def test_every_pair_of_the_noxfile_was_tested():
    """Both ends of both ranges, every test that ran having passed."""
    noxfile = (versions.ROOT / "noxfile.py").read_text()
    pairs = {(python, torch or "newest") for python, torch in re.findall(r'\("(3\.\d+)", "([\d.]*)"\)', noxfile)}
    tested = {(".".join(each["python"].split(".")[:2]), each["asked"]) for each in RESULT["rows"]}
    assert tested == pairs and len(pairs) >= 4
    for each in RESULT["rows"]:
        assert each["failed"] == 0 and each["passed"] > 500, each["failures"]


def test_the_selection_names_what_is_there():
    selected = re.findall(r'"(tests/[^"]+)"', (versions.ROOT / "noxfile.py").read_text())
    assert len(selected) > 10 and all((versions.ROOT / path).exists() for path in selected)
