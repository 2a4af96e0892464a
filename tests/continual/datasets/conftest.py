"""Every data set on disk in either layout, made once; transforms for images of 16 px."""

from __future__ import annotations

import pytest
from continual.datasets import layouts
from open_clip.transform import image_transform

from fastlora.continual.config import DataConfig, RunConfig
from fastlora.continual.datasets.transforms import Transforms


@pytest.fixture(scope="session")
def roots(tmp_path_factory):
    """layout -> directory with all eleven; tests must not change it."""
    return {name: layouts.make_all(tmp_path_factory.mktemp(name), name) for name in ("coop", "torchvision")}


@pytest.fixture(params=["coop", "torchvision"])
def root(request, roots):
    return roots[request.param]


@pytest.fixture(scope="session")
def transform_pair():
    """open_clip's, for training and for tests."""
    return image_transform(16, is_train=True), image_transform(16, is_train=False)


@pytest.fixture(scope="session")
def transforms(transform_pair):
    return Transforms.of(*transform_pair)


@pytest.fixture
def config():
    """config(benchmark, root, **options of data), completed as `fastlora train` does."""
    from fastlora.continual.benchmarks import benchmark

    def make(name, root, seed=0, **data):
        data = {"workers": 1, **data}
        return benchmark(name).completed(RunConfig(benchmark=name, seed=seed, data=DataConfig(root=str(root), **data)))

    return make
