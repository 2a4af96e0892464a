"""The base model as it is: no task changes it."""

from __future__ import annotations

from fastlora.continual.configs.zero_shot import ZeroShotConfig
from fastlora.continual.methods.base import Method


class ZeroShot(Method):
    """No training: every row of the matrix is the base model's, nothing is learned and nothing forgotten. No paper."""

    config_class = ZeroShotConfig
