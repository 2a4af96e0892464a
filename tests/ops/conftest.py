from __future__ import annotations

import pytest

from fastlora.build import build_info, extension
from fastlora.ops import merge as merge_module


@pytest.fixture(params=["cpp", "torch"])
def backend(request, monkeypatch):
    """Each path in turn; the report of a merge must name it."""
    if request.param == "torch":
        monkeypatch.setattr(merge_module, "serves", lambda weight: False)
    elif extension() is None:
        pytest.skip(f"no extension: {build_info()['extension_reason']}")
    return request.param
