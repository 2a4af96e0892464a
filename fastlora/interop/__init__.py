"""Adapters of other projects: PEFT's (LoRA, rsLoRA, AdaLoRA), and those of CoDyRA's and SoRA's released code.

Nothing else in fastlora knows how these name and scale things, and nothing here imports any of them.
"""

from __future__ import annotations

from fastlora.interop.peft_export import export_peft
from fastlora.interop.peft_import import import_peft
from fastlora.interop.released import import_codyra, import_sora

__all__ = ["export_peft", "import_codyra", "import_peft", "import_sora"]
