"""Continual-learning methods: one file each, over the same layer, merge and evaluation."""

from __future__ import annotations

from typing import Any

from fastlora.continual.config import MethodConfig, check_one_of
from fastlora.continual.methods.base import AdapterMethod, Method, TaskContext
from fastlora.continual.methods.codyra import CoDyRA
from fastlora.continual.methods.contribution_prox import ContributionProx
from fastlora.continual.methods.decay_b import DecayB
from fastlora.continual.methods.expert_pool import ExpertPool
from fastlora.continual.methods.full import FullFineTuning
from fastlora.continual.methods.inflora import InfLoRA
from fastlora.continual.methods.joint import Joint
from fastlora.continual.methods.lora import LoRA
from fastlora.continual.methods.lora_squeeze import LoRASqueeze
from fastlora.continual.methods.lwf import LwF
from fastlora.continual.methods.o_lora import OLoRA
from fastlora.continual.methods.path_credit import PathCredit
from fastlora.continual.methods.pearl import PEARL
from fastlora.continual.methods.per_task import PerTask
from fastlora.continual.methods.random_selection import RandomSelection
from fastlora.continual.methods.sd_lora import SDLoRA
from fastlora.continual.methods.sora import SoRA
from fastlora.continual.methods.uniform_shrink import UniformShrink
from fastlora.continual.methods.wise_ft import WiSEFT
from fastlora.continual.methods.zero_shot import ZeroShot
from fastlora.continual.methods.zscl import ZSCL

METHODS: dict[str, type[Method]] = {
    cls.config_class.name: cls
    for cls in (
        CoDyRA,
        LoRA,
        ZeroShot,
        SoRA,
        DecayB,
        UniformShrink,
        RandomSelection,
        ContributionProx,
        PathCredit,
        FullFineTuning,
        WiSEFT,
        LwF,
        ZSCL,
        Joint,
        PerTask,
        LoRASqueeze,
        SDLoRA,
        InfLoRA,
        OLoRA,
        PEARL,
        ExpertPool,
    )
}

__all__ = ["METHODS", "AdapterMethod", "CoDyRA", "LoRA", "Method", "TaskContext", "ZeroShot", "build_method"]


def build_method(config: MethodConfig, **options: Any) -> Method:
    """The method that `config` belongs to.

    Args:
        options: passed to the method (backend).
    Raises:
        ValueError: no method of that name; the accepted ones and the nearest are told.
    """
    check_one_of("method", config.name, METHODS)
    return METHODS[config.name](config, **options)
