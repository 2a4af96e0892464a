"""All cases: importing this fills the registry."""

from __future__ import annotations

import faults.adapter_files
import faults.bad_merges
import faults.bad_models
import faults.bad_numbers
import faults.bad_operands
import faults.bad_weights
import faults.data_sets
import faults.journals
import faults.kills
import faults.many_merges
import faults.memory
import faults.numerics
import faults.platforms
import faults.run_directories
import faults.several_processes
import faults.stops
import faults.writing  # noqa: F401
from faults.case import CASES, Case

GROUPS = ("bad input", "files", "process", "numerics")


def in_groups() -> dict[str, list[Case]]:
    """The cases of each group, in the order in which they are written."""
    return {title: [case for case in CASES.values() if case.group == title] for title in GROUPS}
