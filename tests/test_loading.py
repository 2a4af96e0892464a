"""No file is read in a way that runs what it holds: torch.load with weights_only=True alone, pickles by one reader alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("fastlora", "triton_kernels", "bench", "examples", "tests", "docs")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# calls that build whatever they are told to
PICKLE = {"load", "loads", "Unpickler"}
RUNS_CODE = {
    f"{module}.{name}" for module in ("pickle", "_pickle", "cPickle", "dill", "cloudpickle") for name in PICKLE
}
RUNS_CODE |= {"joblib.load", "marshal.load", "marshal.loads", "shelve.open", "pandas.read_pickle", "torch.jit.load"}
RUNS_CODE |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "Loader", "UnsafeLoader")}
RUNS_CODE |= {"eval", "exec"}
ALLOWED = {
    "fastlora/continual/datasets/formats.py": {"pickle.Unpickler"},  # the base of the one that builds arrays alone
    "fastlora/continual/yaml_text.py": {"yaml.load"},  # with a loader that builds plain values alone
    "tests/faults/planted.py": {"pickle.Unpickler"},  # the planted bug that takes it for that one
    "tests/faults/platforms.py": {"exec"},  # a program written there
    "tests/test_types.py": {"exec"},  # signatures out of the stub and of the extension
    # what a test's own process wrote into a pipe
    "tests/faults/case.py": {"pickle.loads"},
    "tests/distributed/processes.py": {"pickle.loads"},
}


def names_of(tree):
    """What a name in the file stands for: "p" for pickle after `import pickle as p`."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return known


def called(node, known):
    """The dotted name of an expression, or ""."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = called(node.value, known)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def harmful(text):
    """(line, call) of everything in a file that may run what it reads."""
    tree = ast.parse(text)
    known, found = names_of(tree), []
    round_trips = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node.func, known) in ("torch.load", "numpy.load"):
            options = {option.arg: option.value for option in node.keywords}
            name = called(node.func, known)
            key, wanted = ("weights_only", True) if name == "torch.load" else ("allow_pickle", False)
            given = options.get(key, ast.Constant(False))
            if None in options or not isinstance(given, ast.Constant) or given.value is not wanted:
                found.append((node.lineno, name))
        elif isinstance(node, ast.Call) and called(node.func, known) == "pickle.loads":
            inner = node.args[0] if node.args else None
            if isinstance(inner, ast.Call) and called(inner.func, known) == "pickle.dumps":
                round_trips.add(id(node.func))  # what goes in comes from the same line
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Name, ast.Attribute))
            and called(node, known) in RUNS_CODE
            and id(node) not in round_trips
        ):
            found.append((node.lineno, called(node, known)))
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_runs_what_it_reads(folder):
    bad = []
    for path in FILES:
        name = str(path.relative_to(ROOT))
        if name.startswith(f"{folder}/"):
            bad += [
                f"{name}:{line} {call}" for line, call in harmful(path.read_text()) if call not in ALLOWED.get(name, ())
            ]
    assert not bad, f"they may run what a file holds: {', '.join(bad)}"


def test_what_is_allowed_is_still_there():
    for name, calls in ALLOWED.items():
        assert calls == {call for _, call in harmful((ROOT / name).read_text())}, name


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "import torch\ntorch.load(path, **options)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "import pickle\npickle.loads(data)",
        "import pickle as p\np.load(file)",
        "from pickle import loads as read\nread(data)",
        "import pickle\nread = pickle.loads",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "eval(text)",
    ],
)
def test_each_way_is_found(text):
    assert harmful(text)


def test_harmless_ways_are_not():
    text = "import pickle, torch, yaml\ntorch.load(a, weights_only=True)\npickle.loads(pickle.dumps(b))\nyaml.safe_load(c)\nmodel.eval()"
    assert not harmful(text)
