"""Data flows one way: kernels -> ops -> modules -> adapt -> interop -> continual -> cli. No import points back up."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    ("fastlora.triton_kernels",),
    (
        "fastlora.reference",
        "fastlora.checks",
        "fastlora.files",
        "fastlora.fingerprint",
        "fastlora.interrupts",
        "fastlora.tensor_file",
        "fastlora.build",
        "fastlora._C",
    ),
    ("fastlora.ops",),
    ("fastlora.modules",),
    ("fastlora.tied", "fastlora.adapt", "fastlora.merging", "fastlora.optim", "fastlora.sharded", "fastlora.tune"),
    ("fastlora.adapter_file", "fastlora.base_weights"),
    ("fastlora.journal", "fastlora.journal_entry", "fastlora.merge_files"),
    ("fastlora.interop",),
    ("fastlora.continual",),
    ("fastlora.doctor", "fastlora.cli", "fastlora.__main__"),
)
FILES = sorted([*ROOT.glob("fastlora/**/*.py"), *ROOT.glob("triton_kernels/**/*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("fastlora", *parts) if parts[0] == "triton_kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(name: str) -> int | None:
    for index, prefixes in enumerate(LAYERS):
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return index
    return None


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_file_belongs_to_a_layer():
    names = {module_name(path) for path in FILES} - {"fastlora"}
    assert [name for name in sorted(names) if layer_of(name) is None] == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_import_points_up(path):
    own = layer_of(module_name(path))
    if own is None:
        return  # fastlora/__init__.py names everything, lazily
    for imported in imports_of(path):
        layer = layer_of(imported)
        assert layer is None or layer <= own, f"{module_name(path)} imports {imported}, which is above it"


def test_only_the_top_layers_know_open_clip_and_only_one_triton():
    for path in FILES:
        name, imported = module_name(path), {name.split(".")[0] for name in imports_of(path)}
        if "open_clip" in imported:
            assert name.startswith("fastlora.continual") or name == "fastlora.cli"
        if "triton" in imported:
            assert name.startswith("fastlora.triton_kernels")
        assert "triton_kernels" not in imported, "the bare name is another package; write fastlora.triton_kernels"


def test_only_interop_knows_other_projects_names_and_none_imports_peft():
    for path in FILES:
        name, text = module_name(path), path.read_text()
        imported = {each.split(".")[0] for each in imports_of(path)} & {"peft", "transformers"}
        # what works under transformers' Trainer derives from its callback; nothing else needs it
        assert imported == ({"transformers"} if name == "fastlora.interop.hf_trainer" else set()), name
        # doctor tells which version of them is installed
        if name not in ("fastlora", "fastlora.doctor") and not name.startswith("fastlora.interop"):
            assert not any(word in text for word in ("lora_A", "lora_B", "peft")), name


def test_kernels_know_torch_and_triton_alone():
    allowed = {"torch", "triton", "fastlora", *sys.stdlib_module_names}
    for path in FILES:
        if module_name(path).startswith("fastlora.triton_kernels"):
            imported = imports_of(path)
            assert {name.split(".")[0] for name in imported} <= allowed
            assert all(n.startswith("fastlora.triton_kernels") for n in imported if n.startswith("fastlora."))


def test_import_is_light():
    code = (
        "import sys, fastlora; print([m for m in ('torch', 'triton', 'open_clip', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_resolves():
    import fastlora

    pytest.importorskip("open_clip")
    assert all(getattr(fastlora, name) is not None for name in fastlora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(fastlora, "nothing")  # noqa: B009
