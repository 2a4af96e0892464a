"""Every block of docs/interop.md runs, in order."""

import re
from pathlib import Path

import torch
from interop.test_released import codyra

PAGE = Path(__file__).parents[2] / "docs" / "interop.md"


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(codyra()[0], "aircraft.pth")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert re.match(r"35 adapters, \d", capsys.readouterr().out)
