"""deploy/Dockerfile: what can be known of it without building it, and its Python packages installed for real."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from compose_file import IMAGE_FOLDER, PROJECT
from groundglass_ensemble.wheel import find_wheel

DOCKERFILE = PROJECT / "deploy" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Every instruction: its word and the rest, continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage; the first is its FROM."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        found[name].append((word, rest))
    return found


def base_of(name: str) -> str:
    """What a stage is made from: an image or another stage."""
    return stages()[name][0][1].split(" AS ")[0]


def package_installation() -> list[str]:
    """The arguments of pip in the stage that servers are made from."""
    (run,) = [rest for word, rest in stages()["server"] if word == "RUN" and "pip install" in rest]
    return shlex.split(run.partition("pip install ")[2].partition(" && ")[0])


def needed_by(requirement: str) -> set[str]:
    """Names of a distribution and of all that it needs, here and now."""
    needed: set[str] = set()
    waiting = [Requirement(requirement)]
    while waiting:
        wanted = waiting.pop()
        for line in importlib.metadata.requires(wanted.name) or ():
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": one}) for one in ("", *wanted.extras)):
                waiting.append(inner)
        needed.add(wanted.name.replace("_", "-").lower())
    return needed


def link_packages(names: set[str], folder: Path) -> None:
    """Let ``folder`` hold these distributions of this environment, and no other."""
    folder.mkdir()
    for name in names:
        for file in importlib.metadata.files(name) or ():
            if file.parts[0] not in ("..", "__pycache__") and not (folder / file.parts[0]).exists():
                (folder / file.parts[0]).symlink_to(
                    Path(str(file.locate())).parents[len(file.parts) - 1] / file.parts[0]
                )


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a file reach the builder: the last pattern that fits it, or a folder of it, counts."""
    sent = True
    for line in (PROJECT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").replace("**/", "*")
        if line and not line.startswith("#"):
            parents = ["/".join(path.split("/")[:depth]) for depth in range(1, path.count("/") + 2)]
            if any(fnmatch.fnmatch(one, pattern) for one in parents):
                sent = line.startswith("!")
    return sent


def test_images_are_pinned() -> None:
    """Every stage begins with an image of a version or with an earlier stage."""
    earlier: set[str] = set()
    for name in stages():
        base = base_of(name)
        assert base in earlier or re.fullmatch(r"[\w./]+:\d+[\w.]*\.\d+[\w.-]*", base), base
        earlier.add(name)


def test_one_triton_version_everywhere() -> None:
    """The server's image is the one that the documents speak of, and Python in ours is the server's version."""
    tag = base_of("server").rpartition(":")[2]
    documents = [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md"), *(PROJECT / "deploy").rglob("*.md")]
    tags = set(re.findall(r"tritonserver:(\d\d\.\d\d-py3)", "".join(file.read_text() for file in documents)))
    assert tags <= {tag}
    assert base_of("python").startswith("python:3.12.")


@pytest.mark.parametrize("name", ["client", "export", "triton"])
def test_nothing_runs_as_root(name: str) -> None:
    """The last user of each image that is run is a number, as Kubernetes wants it, and not root's."""
    users: list[str] = []
    while name in stages():
        users = [*(rest for word, rest in stages()[name] if word == "USER"), *users]
        name = base_of(name)
    assert int(users[-1].split(":")[0]) > 0


def test_the_last_stage_is_the_server() -> None:
    """A build without a target gives the server, started by serve.sh."""
    name, last = list(stages().items())[-1]
    assert name == "triton"
    assert ("ENTRYPOINT", '["/opt/groundglass/deploy/serve.sh"]') in last
    assert ("EXPOSE", "8000 8001 8002") in last


def test_what_is_copied_exists() -> None:
    """Every file or folder that is copied or mounted from the project exists, and is sent to the builder."""
    copied: list[str] = []
    for word, rest in instructions():
        if word == "COPY":
            copied += [part for part in rest.split()[:-1] if not part.startswith("--")]
        mounts = re.findall(r"--mount=type=bind,source=([^, ]+)", rest)
        copied += mounts
    assert {"core", "constraints.txt", "deploy/serve.sh"} <= set(copied)
    for path in copied:
        assert (PROJECT / path).exists(), path
        assert is_sent(path), path


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        ".venv/bin/python",
        ".git/config",
        "deploy/secrets/control.key",
        "model_repository/unet/1/model.onnx",
        "export/weights/groundglass_unet.safetensors",
        "build/fp16/model.onnx",
        "out/report.json",
        "core/groundglass/__pycache__/study.cpython-312.pyc",
    ],
)
def test_the_builder_gets_no_secret_and_no_model(path: str) -> None:
    """Keys, models, weights and leftovers stay out of the build, and so out of the images."""
    assert not is_sent(path)


def test_scripts_lie_where_they_are_started() -> None:
    """The scripts that compose starts are copied into the image that it starts them in."""
    for name, script in (("server", "serve.sh"), ("server", "tensorrt_version.sh"), ("client", "models.sh")):
        copies = [rest for word, rest in stages()[name] if word == "COPY"]
        assert any(f"deploy/{script}" in copy and copy.endswith(f" {IMAGE_FOLDER}deploy/") for copy in copies)


def test_every_package_that_the_probe_needs_is_named() -> None:
    """Installed without dependencies: so they are named, all but numpy, which the server's image has."""
    given = {word for word in package_installation() if re.fullmatch(r"[a-z][a-z0-9-]+", word)}
    assert given == needed_by("tritonclient[grpc]") - {"numpy"}


def test_the_wheel_serves_with_what_the_image_has(tmp_path: Path) -> None:
    """The wheel, installed as the Dockerfile does it: stage and probe need numpy and tritonclient, and nothing else."""
    pytest.importorskip("hatchling", reason="the wheel's build backend is not installed")
    options = package_installation()
    assert {"--no-deps", "--target"} <= set(options)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(tmp_path),
        str(PROJECT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("groundglass-*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(tmp_path / "packages"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    image = tmp_path / "image"
    link_packages(needed_by("tritonclient[grpc]"), image)
    folders = [str(image), str(find_wheel().python_backend), str(tmp_path / "packages")]
    program = (
        f"import sys; sys.path += {folders!r}; import groundglass_ensemble.scan_aggregator, groundglass_ensemble.probe;"
        "print(groundglass_ensemble.probe.__file__); groundglass_ensemble.probe.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "packages"))
    assert "scan_aggregator" in done.stdout
