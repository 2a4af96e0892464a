"""Types: mypy over the package and a user's program, and the extension's stub against the extension."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.build import extension

ROOT = Path(__file__).parent.parent
STUB = ast.parse((ROOT / "fastlora" / "_C.pyi").read_text())


def test_the_package_and_a_users_program_have_no_type_errors():
    pytest.importorskip("mypy", reason="mypy is not installed (pip install 'fastlora[dev]')")
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    checked = int(re.search(r"no issues found in (\d+) source files", done.stdout)[1])
    files = [*ROOT.glob("fastlora/**/*.py"), *ROOT.glob("fastlora/*.pyi"), *ROOT.glob("triton_kernels/*.py")]
    # the user's program, too; a development tree has triton_kernels in fastlora/ as well
    assert checked == 1 + len({path.resolve() for path in files})


def test_every_function_of_the_kernel_files_that_runs_on_the_host_is_annotated():
    """mypy leaves out those for the device, and cannot tell which they are."""
    bare = []
    for path in sorted(ROOT.glob("triton_kernels/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(each) for each in node.decorator_list):
                continue
            given = [each for each in (*node.args.args, *node.args.kwonlyargs) if each.arg != "self"]
            if node.returns is None or any(argument.annotation is None for argument in given):
                bare.append(f"{path.name}:{node.lineno} {node.name}")
    assert bare == []


def stubbed(body):
    """name -> what the stub says: the parameters of functions, or the members of classes."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            source = f"def {node.name}({ast.unparse(node.args)}): ..."
            space = {}
            exec(f"from __future__ import annotations\n{source}", space)
            found[node.name] = parameters(inspect.signature(space[node.name]))
        elif isinstance(node, ast.ClassDef):
            found[node.name] = stubbed(node.body)
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = None
    return found


def parameters(signature):
    return [(each.name, each.default) for each in signature.parameters.values() if each.name != "self"]


def told(function):
    """Parameters by pybind11's own signature, the first line of a docstring."""
    name, given = re.match(r"(\w+)\((.*)\) -> ", function.__doc__).groups()
    # types name modules that are not at hand
    space = {}
    exec(f"from __future__ import annotations\ndef {name}({given}): ...", space)
    return parameters(inspect.signature(space[name]))


def test_the_stub_of_the_extension_says_what_the_extension_has():
    module = extension()
    if module is None:
        pytest.skip("the extension was not built")
    stub = stubbed(STUB.body)
    built = {name for name in vars(module) if not name.startswith("__")}
    of_cuda = {name for name in stub if "cuda" in name}
    assert set(stub) - built == (set() if of_cuda & built else of_cuda) and built <= set(stub)
    for name in built:
        value = getattr(module, name)
        if not isinstance(value, type):
            assert told(value) == stub[name], name
            continue
        members = {member for member in vars(value) if not member.startswith("_")}
        assert members == {member for member in stub[name] if not member.startswith("_")}, name
        if name != "ItemReport":  # which is only ever returned
            assert told(value.__init__) == stub[name]["__init__"], name
