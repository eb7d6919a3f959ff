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

source_folder=$(cd "$(dirname "$0")/.." && pwd)
version=$("$source_folder/deploy/tensorrt_version.sh")

# A folder of its own: nothing that the server uses is touched, and nothing stays.
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
echo "TensorRT $version: installing its Python package" >&2
python3 -m pip install --quiet --disable-pip-version-check --target "$packages" \
    "$source_folder" onnx onnxruntime "tensorrt==$version"
PYTHONPATH=$packages python3 -m groundglass export tensorrt --model "$model" --out "$plan" "$@"
