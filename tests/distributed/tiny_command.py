"""`fastlora` with the benchmark of seconds and without plots, for torchrun. KILL=RANK kills that process in task 2."""

import os
import sys

from distributed import runs

from fastlora import cli
from fastlora.continual.methods import CoDyRA

runs.know_tiny()
after_step = CoDyRA.after_step


def killed_in_task_2(self, ctx):
    if ctx.number == 2 and os.environ.get("KILL") == os.environ["RANK"]:
        runs.die()
    after_step(self, ctx)


CoDyRA.after_step = killed_in_task_2
sys.exit(cli.main())
