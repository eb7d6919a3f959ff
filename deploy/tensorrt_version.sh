#!/bin/sh
# Prints the TensorRT version of the container that this runs in, as pip spells it. A plan opens under the very version that
# built it, so the container's own decides: NVIDIA's images name it in TRT_VERSION ("11.4.1.9+cuda13.4"), and their package
# manager knows it as well.
set -eu
version=${TRT_VERSION:-}
if [ -z "$version" ]; then
  version=$(dpkg-query --show --showformat '${Version}\n' 'libnvinfer[0-9]*' 2>/dev/null | head -n 1) || true
fi
version=${version%%[-+]*}
if [ -z "$version" ]; then
  echo "this container has no TensorRT: run it in the one that serves the plan, or set TRT_VERSION" >&2
  exit 1
fi
echo "$version"
