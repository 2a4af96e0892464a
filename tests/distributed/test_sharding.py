"""FSDP2 in the trainer: the bits of ddp, with a share of the frozen weights in each process."""

import pytest
import torch

pytest.importorskip("open_clip")

from distributed import runs  # noqa: E402
from distributed.processes import in_processes  # noqa: E402

from fastlora.continual import config as configs  # noqa: E402
from fastlora.continual.config import RunConfig  # noqa: E402
from fastlora.continual.distributed import ALONE, World  # noqa: E402
from fastlora.continual.methods import build_method  # noqa: E402
from fastlora.continual.parallel import check_parallel  # noqa: E402


def test_trains_as_ddp_does():
    """To the bit: gathered weights are the weights."""
    found = in_processes(2, runs.train_sharded)
    for name in found[0]:
        runs.assert_same_bits([run for result in found for run in result[name]])


def test_a_process_holds_its_share_and_gets_all_of_it_back():
    found = in_processes(3, runs.look_at_shards)
    for each in found:
        assert each["held beside"] == 0 and each["same"] and each["adapters"] == {torch.nn.Parameter}
        assert each["held"] < 0.4 * each["whole"]
    assert sum(each["held"] for each in found) == found[0]["whole"]


@pytest.mark.parametrize(
    ("world", "method", "options", "message"),
    [
        (ALONE, configs.CoDyRAConfig(), {"parallel": "fsdp"}, "this process is alone.* torchrun --nproc-per-node"),
        (World(0, 2), configs.CoDyRAConfig(), {"cuda_graph": True}, "2 processes exchange .* --cuda_graph false"),
        (World(0, 2), configs.CoDyRAConfig(), {"parallel": "fsdp", "cuda_graph": True}, "--cuda_graph false"),
        (World(0, 2), configs.CoDyRAConfig(), {"parallel": "fsdp", "compile": "default"}, "compile .* --parallel ddp"),
        (
            World(0, 2),
            configs.FullConfig(),
            {"parallel": "fsdp"},
            "full trains the weights, .*--parallel ddp",
        ),
        (
            World(0, 2),
            configs.JointConfig(train="weights"),
            {"parallel": "fsdp"},
            "joint trains the weights, ",
        ),
        (World(0, 2), configs.ExpertPoolConfig(), {"parallel": "fsdp"}, "what expert_pool trains .* --parallel ddp"),
    ],
)
def test_what_does_not_go_together(world, method, options, message):
    config = RunConfig(method=method, **options)
    with pytest.raises(ValueError, match=message):
        check_parallel(config, build_method(method), world)


def test_what_does():
    for method in (configs.CoDyRAConfig(), configs.InfLoRAConfig(), configs.JointConfig()):
        check_parallel(RunConfig(method=method, parallel="fsdp"), build_method(method), World(1, 2))
    for method in (configs.FullConfig(), configs.ExpertPoolConfig()):
        check_parallel(RunConfig(method=method, compile="default"), build_method(method), World(1, 2))
        check_parallel(RunConfig(method=method, cuda_graph=True), build_method(method), ALONE)
