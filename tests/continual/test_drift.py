import pytest
import torch

from fastlora.continual.drift import Drift


def test_norm_is_the_distance_of_all_parameters(clip):
    drift = Drift(clip)
    assert drift.norm(clip) == 0
    with torch.no_grad():
        clip.visual.proj[0, 0] += 3.0
        clip.ln_final.bias[1] -= 4.0
    assert drift.norm(clip) == pytest.approx(5.0, rel=1e-6)
