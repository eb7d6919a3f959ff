#!/bin/sh
# Starts Triton on the model repository, inside its container or wherever tritonserver is on PATH; further options go to it.
# MODEL_REPOSITORY: the folder, by default /models.
# CONTROL_KEY_FILE: a file with the key that loading, tracing and logging settings ask for. Explicit model control needs it.
# ALLOW_CLIENT_SHM: true lets clients of the same IPC namespace leave tensors in shared memory; by default false.
# TRACE_TO: OTLP/HTTP endpoint of a collector for OpenTelemetry spans of the requests whose clients ask for it; by default none.
# MALLOC_LIBRARY: an allocator for the server to run on, by default the system's own.
set -eu

refuse() {
  echo "serve.sh: $1" >&2
  exit 1
}

repository=${MODEL_REPOSITORY:-/models}
allow_shm=${ALLOW_CLIENT_SHM:-false}
[ -d "$repository" ] || refuse "$repository is no folder; mount the model repository there, or set MODEL_REPOSITORY"
case $allow_shm in true | false) ;; *) refuse "ALLOW_CLIENT_SHM is $allow_shm: expected true or false" ;; esac
case ${TRACE_TO:-none} in
  none) ;;
  http://?* | https://?*)
    # rate=0: only requests that carry a client's span are traced.
    set -- --trace-config=mode=opentelemetry "--trace-config=opentelemetry,url=$TRACE_TO" --trace-config=level=TIMESTAMPS \
      --trace-config=rate=0 "$@"
    ;;
  *) refuse "TRACE_TO is $TRACE_TO: expected none, or a collector's endpoint such as http://collector:4318/v1/traces" ;;
esac
[ -z "${MALLOC_LIBRARY:-}" ] || [ -r "$MALLOC_LIBRARY" ] || refuse "MALLOC_LIBRARY: no library at $MALLOC_LIBRARY"

# Servers from 26.05 on refuse their clients' shared memory unless told otherwise (triton-inference-server/server#8721);
# older ones always take it, and end at a flag that they don't know.
if tritonserver --help 2>&1 | grep -q -e '--allow-client-shm'; then
  set -- "--allow-client-shm=$allow_shm" "$@"
fi

if [ -n "${CONTROL_KEY_FILE:-}" ]; then
  [ -r "$CONTROL_KEY_FILE" ] || refuse "CONTROL_KEY_FILE: $CONTROL_KEY_FILE can't be read; it must hold the control key"
  key=$(cat "$CONTROL_KEY_FILE")
  # Triton parses it out of an option, and clients send it as a header.
  case $key in *[!A-Za-z0-9_-]*) refuse "$CONTROL_KEY_FILE: expected letters, digits, - and _ in one line" ;; esac
  [ ${#key} -ge 16 ] || refuse "$CONTROL_KEY_FILE holds ${#key} characters: expected a key of 16 or more"
  protected=model-repository,trace,logging
  [ "$allow_shm" = true ] || protected=$protected,shared-memory
  # Clients that only analyse need no key: inference, health, metadata, statistics and model-config stay open.
  set -- "--grpc-restricted-protocol=$protected:groundglass-key=$key" "$@"
  set -- "--http-restricted-api=$protected:groundglass-key=$key" "$@"
else
  for option in "$@"; do
    [ "$option" != --model-control-mode=explicit ] ||
      refuse "explicit model control needs a key: name its file in CONTROL_KEY_FILE"
  done
fi

# Only for the server and its stages: glibc's allocator gives little back after models come and go.
[ -z "${MALLOC_LIBRARY:-}" ] || export LD_PRELOAD="$MALLOC_LIBRARY"
exec tritonserver --model-repository="$repository" "$@"
