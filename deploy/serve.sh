#!/bin/sh
# Starts Triton on the model repository, inside its container or wherever tritonserver is on PATH; further options go to it.
# MODEL_REPOSITORY: the folder, by default /models.
set -eu
repository=${MODEL_REPOSITORY:-/models}
if [ ! -d "$repository" ]; then
  echo "serve.sh: $repository is no folder; mount the model repository there, or set MODEL_REPOSITORY" >&2
  exit 1
fi
# Servers from 26.05 on refuse their clients' shared memory unless told otherwise (triton-inference-server/server#8721);
# older ones always take it, and end at a flag that they don't know. Only clients of the same IPC namespace can use it.
if tritonserver --help 2>&1 | grep -q -e '--allow-client-shm'; then
  set -- --allow-client-shm=true "$@"
fi
exec tritonserver --model-repository="$repository" "$@"
