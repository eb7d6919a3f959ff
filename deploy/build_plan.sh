#!/usr/bin/env bash
# Builds a TensorRT plan with the TensorRT version of the container that this runs in; deploy/README.md has the command.
# Usage: build_plan.sh MODEL.onnx MODEL.plan [further options of "groundglass export tensorrt"]
set -euo pipefail

refuse() {
    echo "build_plan.sh: $1" >&2
    exit 1
}

[ $# -ge 2 ] || refuse "expected MODEL.onnx (FP16) and MODEL.plan"
model=$1
plan=$2
shift 2
[ -f "$model" ] || refuse "$model: no such file; make it with groundglass export fp16"

# A plan opens under the very version that built it, so the container's own decides: NVIDIA's images name it in
# TRT_VERSION ("11.4.1.9+cuda13.4"), and their package manager knows it as well.
version=${TRT_VERSION:-}
if [ -z "$version" ]; then
    version=$(dpkg-query --show --showformat '${Version}\n' 'libnvinfer[0-9]*' 2>/dev/null | head -n 1) || true
fi
version=${version%%[-+]*}
[ -n "$version" ] || refuse "this container has no TensorRT: run it in the one that serves the plan, or set TRT_VERSION"

# A folder of its own: nothing that the server uses is touched, and nothing stays.
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
source_folder=$(cd "$(dirname "$0")/.." && pwd)
echo "TensorRT $version: installing its Python package" >&2
python3 -m pip install --quiet --disable-pip-version-check --target "$packages" \
    "$source_folder" onnx onnxruntime "tensorrt==$version"
PYTHONPATH=$packages python3 -m groundglass export tensorrt --model "$model" --out "$plan" "$@"
