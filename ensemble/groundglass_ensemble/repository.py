"""A model repository held against the tensor contract, before a server or a colleague finds the difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from groundglass import contract
from groundglass.contract import ModelSpec, TensorSpec
from groundglass.errors import RepositoryError
from groundglass.manifest import check_digest, manifest_path, read_manifest

PRODUCTION: Final = "config.pbtxt"
_TRITON_STRING: Final = {"BYTES": "STRING"}  # the one type that configs and the protocol name differently
_PARAMETERS: Final = (contract.RUN_PARAMETER, contract.TTL_PARAMETER, contract.CAPACITY_PARAMETER)


def read_config(file: Path) -> Any:
    """A ``config.pbtxt`` as a protobuf ``ModelConfig``. Raises RepositoryError naming the file and line at fault."""
    try:
        return text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
    except OSError as error:
        raise RepositoryError(f"{file}: {error.strerror}") from error
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{file} is no Triton model config: {error}") from error


def policy_of(config: Any) -> tuple[int, ...] | None:
    """The versions that a config of ``unet`` names, lowest first; None when it leaves the choice to Triton."""
    if config.version_policy.WhichOneof("policy_choice") != "specific":
        return None
    return tuple(sorted(config.version_policy.specific.versions))


def live_of(config: Any) -> int:
    """The version that a config of ``ct_scan`` asks ``unet`` for; ``contract.NEWEST`` when it names none."""
    for step in config.ensemble_scheduling.step:
        if step.model_name == contract.UNET.name:
            return int(step.model_version)
    raise RepositoryError(f"the config of {config.name or contract.CT_SCAN.name} has no step {contract.UNET.name}")


def check_repository(repository: Path, config_name: str | None = None) -> None:
    """Raise RepositoryError with every problem of a repository that is to be served with ``config_name``."""
    problems = find_problems(repository, config_name)
    if problems:
        raise RepositoryError(f"{repository} can't be served: " + "; ".join(problems))


def find_problems(repository: Path, config_name: str | None = None, model_files: bool = True) -> list[str]:
    """What is wrong with a repository, each problem naming its model and field; empty when it keeps the contract.

    ``config_name`` chooses ``configs/<name>.pbtxt`` where a model has one, as Triton does; None the production configs.
    ``model_files`` says whether versions and model files must be there, which a repository under version control lacks.
    """
    problems = []
    configs = {}
    for spec in contract.MODELS:
        file = config_file(repository / spec.name, config_name)
        try:
            configs[spec.name] = read_config(file)
        except RepositoryError as error:
            problems.append(f"{spec.name}: {error}")
            continue
        found = [*_interface(configs[spec.name], spec), *(_files(file, configs[spec.name]) if model_files else ())]
        problems += [f"{spec.name}: {problem}" for problem in found]
    problems += [f"{contract.UNET.name}: {problem}" for problem in _pinned(repository, config_name, configs)]
    if len(configs) == len(contract.MODELS):
        problems += [f"{contract.CT_SCAN.name}: {problem}" for problem in _ensemble(configs)]
        problems += [f"{contract.SCAN_AGGREGATOR.name}: {problem}" for problem in _aggregator(configs)]
    return problems


def _pinned(repository: Path, config_name: str | None, found: dict[str, Any]) -> Iterator[str]:
    """Ensembles that ask for a version of ``unet`` which its config does not load: Triton would not start."""
    loaded = policy_of(found[contract.UNET.name]) if contract.UNET.name in found else None
    if loaded is None:
        return
    for model in (repository / contract.CT_SCAN.name, *sorted(repository.glob(f"{contract.PIN_PREFIX}*"))):
        try:
            wanted = live_of(read_config(config_file(model, config_name)))
        except RepositoryError as error:
            yield str(error)
            continue
        if wanted not in (contract.NEWEST, *loaded):
            yield f"{model.name} asks for version {wanted}, and versions {list(loaded)} are loaded"


def config_file(model: Path, config_name: str | None) -> Path:
    """The config that Triton takes for the model in this folder."""
    variant = model / "configs" / f"{config_name}.pbtxt"
    return variant if config_name is not None and variant.is_file() else model / PRODUCTION


def _interface(config: Any, spec: ModelSpec) -> Iterator[str]:
    """Differences in name, batch size, and inputs and outputs."""
    if config.name != spec.name:
        yield f"name is {config.name!r}, expected {spec.name!r}"
    if config.max_batch_size != spec.max_batch:
        yield f"max_batch_size is {config.max_batch_size}, expected {spec.max_batch}"
    yield from _tensors("input", config.input, spec.inputs)
    yield from _tensors("output", config.output, spec.outputs)


def _tensors(kind: str, found: Sequence[Any], expected: Sequence[TensorSpec]) -> Iterator[str]:
    names = [tensor.name for tensor in found]
    wanted = [tensor.name for tensor in expected]
    if names != wanted:
        yield f"{kind}s are {names}, expected {wanted}"
        return
    for tensor, spec in zip(found, expected, strict=True):
        datatype = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
        if datatype != _TRITON_STRING.get(spec.datatype, spec.datatype):
            yield f"{kind} {spec.name} has data_type {datatype}, expected {spec.datatype}"
        if tuple(tensor.dims) != spec.dims:
            yield f"{kind} {spec.name} has dims {list(tensor.dims)}, expected {list(spec.dims)}"


def _files(file: Path, config: Any) -> Iterator[str]:
    """Missing versions and model files, and files that are not those of their manifests.

    Versions that the config does not load may be staged for other servers, and are not looked at.
    """
    model = file.parent.parent if file.parent.name == "configs" else file.parent
    versions = [folder for folder in model.iterdir() if folder.is_dir() and folder.name.isdigit()]
    loaded = policy_of(config)
    if loaded is not None:
        named = set(map(str, loaded))
        for missing in sorted(named - {folder.name for folder in versions}):
            yield f"version {missing}, which the config loads, has no folder in {model}"
        versions = [folder for folder in versions if folder.name in named]
    if not versions:
        yield f"{model} has no version folder"
    if config.platform == "ensemble":
        return
    name = config.default_model_filename or "model.py"
    for version in versions:
        if not (version / name).exists():
            yield f"version {version.name} has no file {name} ({version / name})"
        else:
            yield from _provenance(version / name, config.name)


def _provenance(model_file: Path, model: str) -> Iterator[str]:
    """A manifest that is damaged, of another file, or of another model; a model without one is not ours to judge."""
    if not manifest_path(model_file).exists():
        return
    try:
        manifest = read_manifest(model_file)
        check_digest(model_file, manifest)
    except RepositoryError as error:
        yield str(error)
        return
    if (manifest.model, manifest.file) != (model, model_file.name):
        yield f"{manifest_path(model_file)} is the manifest of {manifest.file} of {manifest.model}"


def _ensemble(configs: dict[str, Any]) -> Iterator[str]:
    """Steps that are missing, map tensors that a model lacks, or read tensors that nothing makes."""
    ensemble = configs[contract.CT_SCAN.name]
    specs = {spec.name: spec for spec in contract.ENSEMBLE_STEPS}
    steps = {step.model_name: step for step in ensemble.ensemble_scheduling.step}
    if sorted(steps) != sorted(specs) or len(steps) != len(ensemble.ensemble_scheduling.step):
        yield f"ensemble steps are {sorted(steps)}, expected each of {sorted(specs)} once"
        return
    types = {tensor.name: (tensor.datatype, tensor.dims) for tensor in contract.CT_SCAN.inputs}
    types |= {
        ensemble_tensor: _type(specs[name].outputs, tensor)
        for name, step in steps.items()
        for tensor, ensemble_tensor in step.output_map.items()
    }
    for name, step in steps.items():
        for tensors, mapping in ((specs[name].inputs, step.input_map), (specs[name].outputs, step.output_map)):
            if sorted(mapping) != sorted(tensor.name for tensor in tensors):
                yield f"step {name} maps {sorted(mapping)}, expected {sorted(tensor.name for tensor in tensors)}"
        for tensor, ensemble_tensor in step.input_map.items():
            if types.get(ensemble_tensor) != _type(specs[name].inputs, tensor):
                yield f"step {name} reads {tensor} from {ensemble_tensor!r}, which no step makes as it needs it"
    for output in contract.CT_SCAN.outputs:
        if types.get(output.name) != (output.datatype, output.dims):
            yield f"no step makes the output {output.name}"


def _type(tensors: Sequence[TensorSpec], name: str) -> tuple[str, tuple[int, ...]] | None:
    return next(((tensor.datatype, tensor.dims) for tensor in tensors if tensor.name == name), None)


def _aggregator(configs: dict[str, Any]) -> Iterator[str]:
    config = configs[contract.SCAN_AGGREGATOR.name]
    if [group.count for group in config.instance_group] != [1]:
        yield "instance_group must be one instance: its studies lie in one process"
    for name in _PARAMETERS:
        if name not in config.parameters:
            yield f"parameter {name} is missing"
