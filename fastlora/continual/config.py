"""What a user can set: frozen dataclasses that check themselves on construction. Imports neither torch nor open_clip.

`CONFIGS` maps the name typed after `--method` to the method's options (in `configs/`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastlora.continual.configs.base import MethodConfig, UsageError, check_count, check_flag, check_one_of, nearest
from fastlora.continual.configs.bounds import JointConfig, PerTaskConfig
from fastlora.continual.configs.data import DataConfig
from fastlora.continual.configs.full import FullConfig, LwFConfig, WiSEFTConfig, ZSCLConfig
from fastlora.continual.configs.gated import CoDyRAConfig, LoRAConfig, SoRAConfig
from fastlora.continual.configs.rules import (
    ContributionProxConfig,
    DecayBConfig,
    PathCreditConfig,
    RandomSelectionConfig,
    UniformShrinkConfig,
)
from fastlora.continual.configs.subspaces import (
    ExpertPoolConfig,
    InfLoRAConfig,
    LoRASqueezeConfig,
    OLoRAConfig,
    PEARLConfig,
    SDLoRAConfig,
)
from fastlora.continual.configs.zero_shot import ZeroShotConfig

__all__ = [
    "CONFIGS",
    "CoDyRAConfig",
    "ExpertPoolConfig",
    "FullConfig",
    "InfLoRAConfig",
    "JointConfig",
    "DataConfig",
    "LoRAConfig",
    "LoRASqueezeConfig",
    "LwFConfig",
    "MethodConfig",
    "OLoRAConfig",
    "PEARLConfig",
    "PerTaskConfig",
    "RunConfig",
    "SDLoRAConfig",
    "UsageError",
    "WiSEFTConfig",
    "ZSCLConfig",
    "ZeroShotConfig",
    "check_one_of",
    "method_config",
    "nearest",
    "run_config",
]

LOG_TO = ("tensorboard", "wandb")


@dataclass(frozen=True)
class RunConfig:
    """A run: which benchmark, which method, and how it is carried out.

    Args:
        benchmark: name of the task stream.
        method: the method's options.
        seed: decides adapters, image order and, in few-shot benchmarks, the training images; >= 0.
        device: auto (a GPU where torch sees one), cpu, cuda, cuda:1 ...
        backend: of the adapted layers: auto, torch or triton.
        dtype: that frozen weights and activations have in training and evaluation: float32, bfloat16 or float16. Adapters
            are float32, and so are the weights that they are merged into.
        accumulate: parts in which the images of a step go through the model, for the memory of one part; the loss is
            that of the whole batch, at the price of a second forward pass of the images.
        activation_checkpointing: keep the input of each block alone for backward, and compute the rest again.
        compile: no, default or max-autotune: the towers by torch.compile, anew for each task.
        cuda_graph: capture a whole step once per task and replay it, for methods without hooks of their own at each step.
        parallel: how several processes (torchrun) train together: ddp, each with the whole model; or fsdp, each with a
            share of the frozen weights of the blocks while a task trains. Of one process neither.
        eval_batch_size: images per forward pass in evaluation, in each process.
        log_every: iterations from one line of log.csv to the next.
        checkpoints: merged weights to keep: last (after the last task), all, or none. The adapters are always kept.
        log_to: where figures go beside log.csv, out of tensorboard and wandb; each needs its package.
        data: the images, for benchmarks that read them from disk.
        model: architecture of open_clip, or a JSON file that describes one; None for the benchmark's own.
        pretrained: open_clip's tag of the weights, or a file of them; None for the benchmark's own.
    """

    benchmark: str = "demo"
    method: MethodConfig = field(default_factory=CoDyRAConfig)
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"
    dtype: str = "float32"
    accumulate: int = 1
    activation_checkpointing: bool = False
    compile: str = "no"
    cuda_graph: bool = False
    parallel: str = "ddp"
    eval_batch_size: int = 256
    log_every: int = 10
    checkpoints: str = "last"
    log_to: tuple[str, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    model: str | None = None
    pretrained: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, MethodConfig):
            raise ValueError(f"method is {self.method!r}; it must be a config. Build one, such as CoDyRAConfig().")
        check_count("seed", self.seed, "Give 0 or another whole number.", least=0)
        check_one_of("backend", self.backend, ("auto", "torch", "triton"))
        check_one_of("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        check_count(
            "accumulate", self.accumulate, "Give the parts in which a step's images are computed, 1 for all at once."
        )
        check_flag("activation_checkpointing", self.activation_checkpointing)
        check_flag("cuda_graph", self.cuda_graph)
        check_one_of("compile", self.compile, ("no", "default", "max-autotune"))
        check_one_of("parallel", self.parallel, ("ddp", "fsdp"))
        check_count("eval_batch_size", self.eval_batch_size, "Give the images per forward pass, such as 256.")
        check_count("log_every", self.log_every, "Give the iterations between two lines of the log, such as 10.")
        check_one_of("checkpoints", self.checkpoints, ("last", "all", "none"))
        if isinstance(self.log_to, str) or not isinstance(self.log_to, Iterable):
            raise ValueError(f"log_to is {self.log_to!r}; it must be a list, such as [{LOG_TO[0]}].")
        object.__setattr__(self, "log_to", tuple(dict.fromkeys(self.log_to)))
        for name in self.log_to:
            check_one_of("log_to", name, LOG_TO)
        if not isinstance(self.data, DataConfig):
            raise ValueError(f"data is {self.data!r}; it must be a config. Build one, such as DataConfig(root=...).")

    # how a run is carried out, not what it computes: a resumed run may change them, and differs by rounding at most
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *("device", "backend", "accumulate", "activation_checkpointing", "compile", "cuda_graph"),
        *("parallel", "eval_batch_size", "checkpoints", "log_to"),
        *("data.root", "data.workers", "data.verify"),
        *("data.cache_gb", "data.cache_dir", "data.cache_dir_gb", "data.cache_crops"),
    )

    @property
    def fixes_shapes(self) -> bool:
        """Whether dead components stay in their tensors: what is compiled, captured or clipped looks at all of them."""
        return self.cuda_graph or self.compile != "no" or getattr(self.method, "clip_norm", 0.0) > 0

    def keeps_checkpoint(self, task: int, tasks: int) -> bool:
        """Whether the merged weights after `task` (from 1) of `tasks` are saved."""
        return self.checkpoints == "all" or (self.checkpoints == "last" and task == tasks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML; what `fastlora train --config` reads."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return values | {"method": self.method.as_dict(), "data": self.data.as_dict(), "log_to": list(self.log_to)}


CONFIGS: dict[str, type[MethodConfig]] = {
    cls.name: cls
    for cls in (
        CoDyRAConfig,
        LoRAConfig,
        ZeroShotConfig,
        SoRAConfig,
        DecayBConfig,
        UniformShrinkConfig,
        RandomSelectionConfig,
        ContributionProxConfig,
        PathCreditConfig,
        FullConfig,
        WiSEFTConfig,
        LwFConfig,
        ZSCLConfig,
        JointConfig,
        PerTaskConfig,
        LoRASqueezeConfig,
        SDLoRAConfig,
        InfLoRAConfig,
        OLoRAConfig,
        PEARLConfig,
        ExpertPoolConfig,
    )
}


def method_config(name: str, **options: Any) -> MethodConfig:
    """The config of the method called `name`.

    Raises:
        ValueError: no method of that name, or an option that the method does not have; the nearest name is told.
    """
    check_one_of("method", name, CONFIGS)
    accepted = [item.name for item in dataclasses.fields(CONFIGS[name])]
    for option in options:
        check_one_of(f"option of method {name}", option, accepted)
    return CONFIGS[name](**options)


def run_config(values: dict[str, Any]) -> RunConfig:
    """The config that `RunConfig.as_dict` gave these values of, such as the config.yaml of a run."""
    method, data = values["method"], values.get("data") or {}
    return RunConfig(**values | {"method": method_config(**method), "data": DataConfig(**data)})


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config under the names that the command line has for them, such as "method.rank"."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        named |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return named
