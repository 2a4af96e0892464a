"""Measuring which variant and tile is fastest for the calls of a model, and writing the user's dispatch table.

    calls = fastlora.tune.calls_of(model, images, texts)
    print(fastlora.tune.tune(calls))

Nothing is tuned unless this is called; `fastlora tune` is the same from the command line.
"""

from fastlora.tune.calls import Call, calls_of
from fastlora.tune.candidates import Candidate
from fastlora.tune.report import Outcome, Trial, TuneReport
from fastlora.tune.tuning import tune

__all__ = ["Call", "Candidate", "Outcome", "Trial", "TuneReport", "calls_of", "tune"]
