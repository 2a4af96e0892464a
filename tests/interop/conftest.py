"""The real PEFT is the judge of what it loads; peft is a development dependency."""

import pytest

pytest.importorskip("peft")
pytest.importorskip("open_clip")
