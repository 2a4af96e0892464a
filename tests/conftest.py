"""Settings of every test: Triton's interpreter, one thread, NaN-filled `torch.empty`, and the count of GPU skips."""

from __future__ import annotations

import os
from importlib.util import find_spec

# before anything imports Triton: its kernels then run on CPU tensors
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# The first backward of a process decides about autograd's threads. One within torch.compile, whose fake tensors may be of any
# device, starts them, and then no process that is forked later can go backward.
torch.ones((), requires_grad=True).backward()
if find_spec("hypothesis"):
    from hypothesis import Phase, settings

    # the same examples in every run: what a change breaks is the change's. Unshrunk: a search for the smallest failure may
    # take minutes; `--hypothesis-profile=default` makes it.
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("suite", derandomize=True, deadline=None, max_examples=30, database=None, phases=phases)
    settings.load_profile("suite")


@pytest.fixture(autouse=True)
def nan_filled_empty():
    """Every `torch.empty` holds NaN, so that an element which a kernel forgets to write fails the comparison."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum("needs a GPU" in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"GPU cases skipped, because no GPU is here: {count}")
