"""Methods, and what of a run is compared, for the tests of runs that are stopped and resumed."""

import torch
from safetensors import safe_open

from fastlora.continual import CoDyRAConfig, LoRAConfig, ZeroShotConfig, methods
from fastlora.continual.methods import LoRA

FILES = ("accuracy.csv", "accuracy_union.csv", "ranks.csv", "log.csv", "metrics.json", "config.yaml")


class StatefulConfig(LoRAConfig):
    name = "stateful"


class Stateful(LoRA):
    """Holds the text projection to the mean of what it was after the earlier tasks."""

    config_class = StatefulConfig

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.mean, self.count = torch.zeros(()), torch.zeros((), dtype=torch.long)

    def choose_trainable(self, model):
        """The gates, too: then the loss of a later task depends on the state."""

    def extra_loss(self, ctx):
        return (ctx.step["text_features"].mean() - self.mean).square() if self.count else None

    def end_task(self, ctx):
        self.count += 1
        self.mean = self.mean + (ctx.step["text_features"].detach().mean() - self.mean) / self.count
        return super().end_task(ctx)

    def state_dict(self):
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state):
        self.mean, self.count = state["mean"], state["count"]


class PlainConfig(LoRAConfig):
    name = "plain"


class Plain(methods.Method):
    """Trains the image projection itself: no adapter, nothing in a journal."""

    config_class, trains, journaled = PlainConfig, True, False

    def begin_task(self, ctx):
        ctx.model.requires_grad_(False)
        ctx.model.visual.proj.requires_grad_(True)
        self.before = ctx.model.visual.proj.detach().clone()
        ctx.optimizer = torch.optim.AdamW([ctx.model.visual.proj], lr=self.config.lr)

    def abandon(self, model):
        if hasattr(self, "before"):
            model.visual.proj.data.copy_(self.before)

    def end_task(self, ctx):
        del self.before


CONFIGS = {
    "codyra": CoDyRAConfig(rank=4, iterations=3, batch_size=16, lr=1e-2, kappa_max=0.3),
    "lora": LoRAConfig(rank=2, iterations=2, batch_size=16, lr=1e-2),
    "stateful": StatefulConfig(rank=2, iterations=2, batch_size=16, lr=1e-2),
    "plain": PlainConfig(iterations=2, batch_size=16, lr=1e-2),
    "zero_shot": ZeroShotConfig(),
    "quick": LoRAConfig(rank=1, iterations=1, batch_size=8, targets=("v",), where="vision"),
}


def results(out, model):
    """The weights, and the content of every file that a figure or a weight can be read from."""
    found = {f"weights {key}": value.clone() for key, value in model.state_dict().items()}
    found |= {name: (out / name).read_bytes() for name in FILES}
    for path in sorted([*out.glob("adapters/*"), *out.glob("checkpoints/task_*")]):
        with safe_open(path, framework="pt") as file:  # whose writer gives the header's entries in any order
            found[path.name] = file.metadata()
            found |= {f"{path.relative_to(out)} {key}": file.get_tensor(key) for key in file.keys()}
    return found


def assert_same_results(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key


def content(out):
    """Every file of a directory."""
    return {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


class Killed(BaseException):
    pass


def stop(after=False, task=2, step=None, error=Killed):
    """Wraps a hook so that it raises in `task`, at iteration `step` or whenever it is called, before or after its work."""

    def wrap(hook):
        def wrapped(ctx):
            here = ctx.number == task and (step is None or ctx.step["iteration"] == step)
            if here and not after:
                raise error("stopped")
            result = hook(ctx)
            if here:
                raise error("stopped")
            return result

        return wrapped

    return wrap
