"""Where the nvidia-pytriton wheel keeps Triton, and the backend folder made from it and from the stand-ins."""

from __future__ import annotations

import compileall
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from groundglass.errors import MissingExtra, SettingError

STAND_INS = Path(__file__).parent / "backends"
SHARED = STAND_INS / "shared"
"""Modules that every stand-in's folder gets a copy of: a backend finds nothing outside its own."""


@dataclass(frozen=True, slots=True)
class TritonWheel:
    """The parts of the wheel that a server needs, for the running interpreter."""

    server: Path
    libraries: Path
    python_backend: Path
    stub: Path


def find_wheel() -> TritonWheel:
    """Look the wheel up without importing it, since its import takes a second and sets up logging.

    Raises MissingExtra when it is not installed, and SettingError when it can't work with this interpreter or numpy.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise MissingExtra("nvidia-pytriton", "serve")
    package = Path(spec.origin).parent
    root = package / "tritonserver"
    if not (root / "bin" / "tritonserver").is_file():
        raise SettingError(f"{package} holds no Triton server: nvidia-pytriton has it in its wheels for Linux only")
    _check_numpy()
    return TritonWheel(
        server=root / "bin" / "tritonserver",
        libraries=package.parent / "nvidia_pytriton.libs",
        python_backend=root / "backends" / "python",
        stub=_find_stub(root / "python_backend_stubs"),
    )


def assemble_backends(wheel: TritonWheel, folder: Path) -> Path:
    """Fill ``folder`` with what ``--backend-directory`` wants: the Python backend, and the stand-ins beside it.

    Copies, not links: Triton refuses a backend whose real path lies elsewhere ("escapes backend directory").
    """
    python = folder / "python"
    python.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy(wheel.python_backend / name, python)
    shutil.copy(wheel.stub, python)
    copy_stand_ins(folder)
    return folder


def copy_stand_ins(folder: Path) -> None:
    """Fill ``folder`` with a folder for each stand-in, the shared modules among its own."""
    for model in sorted(STAND_INS.glob("*/model.py")):
        target = folder / model.parent.name
        target.mkdir(parents=True)
        for source in (*model.parent.glob("*.py"), *SHARED.glob("*.py")):
            shutil.copy(source, target)


def compile_stages(repository: Path) -> None:
    """Write the bytecode that the Python stages of ``repository`` would write at their first start.

    Triton takes a new file in a model's folder for a change of the model, and would load the stage again, its state
    lost, with the next ensemble that is loaded. A repository that can't be written is left as it is.
    """
    for source in repository.glob("*/[0-9]*/model.py"):
        compileall.compile_file(source, quiet=2)  # only where it is missing or older than its source


def server_environment(wheel: TritonWheel) -> dict[str, str]:
    """The environment of the server, and so of the Python stages, which take their packages from this interpreter's.

    A stage's process runs isolated (it ignores PYTHONPATH) and finds its packages through the ``python3`` that is first
    on PATH; its libpython is found through LD_LIBRARY_PATH. Raises SettingError when either can't be had.
    """
    programs = Path(sys.prefix) / "bin"
    if not (programs / "python3").exists():
        raise SettingError(f"{programs} has no python3, through which Triton finds the packages of its Python stages")
    libraries = [str(wheel.libraries), *_libpython_folder()]
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return {
        # Each of glibc's arenas keeps image tensors of its own: with two a near-free network is served in 480 MB where
        # the default took 710, at the same speed (November 2026).
        "MALLOC_ARENA_MAX": "2",
        **os.environ,
        "PATH": os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)]),
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *([inherited] if inherited else [])]),
    }


def _check_numpy() -> None:
    try:
        version = importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtra("numpy", "serve") from None
    if int(version.split(".")[0]) >= 2:
        raise SettingError(
            f"numpy {version} is installed, and this Triton needs numpy < 2: newer ones corrupt the tensors of Python "
            "stages (triton-inference-server/server#8372); pip install 'groundglass[serve]' brings the right one"
        )


def _find_stub(stubs: Path) -> Path:
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = stubs / running / "triton_python_backend_stub"
    if sys.implementation.name != "cpython" or not stub.is_file():
        known = ", ".join(sorted((path.name for path in stubs.iterdir()), key=lambda name: int(name.split(".")[1])))
        raise SettingError(
            f"this is {sys.implementation.name} {running}, and Triton's Python stages run on CPython {known}"
        )
    return stub


def _libpython_folder() -> list[str]:
    """The folder of the interpreter's shared library, unless it is where the loader looks anyway."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    configured = sysconfig.get_config_var("LIBDIR")
    for folder in (Path(sys.base_prefix) / "lib", *([Path(configured)] if configured else [])):
        if (folder / name).exists():
            return [str(folder)]
    return []
