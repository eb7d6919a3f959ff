#!/bin/sh
# groundglass models on every replica of the private network, with the control key; arguments go to it.
# TRITON_HOST: the name that resolves to the replicas, by default triton. TRITON_GRPC_PORT: by default 8001.
# CONTROL_KEY_FILE: the file with the key that the servers were started with.
set -eu

refuse() {
  echo "models.sh: $1" >&2
  exit 1
}

host=${TRITON_HOST:-triton}
port=${TRITON_GRPC_PORT:-8001}
key_file=${CONTROL_KEY_FILE:-}
[ -r "$key_file" ] || refuse "CONTROL_KEY_FILE: '$key_file' can't be read; it must hold the control key"

# Not through the balancer: each step must be taken on every replica, and the balancer lets none of this pass.
servers=
for address in $(getent ahostsv4 "$host" | cut -d ' ' -f 1 | sort -u); do
  servers=${servers:+$servers,}$address:$port
done
[ -n "$servers" ] || refuse "TRITON_HOST: $host has no address here; are the servers running?"

# By the environment, which only this user can read: arguments show in every list of processes.
GROUNDGLASS_CONTROL_HEADER="triton-grpc-protocol-groundglass-key=$(cat "$key_file")"
GROUNDGLASS_SERVER=$servers
export GROUNDGLASS_CONTROL_HEADER GROUNDGLASS_SERVER
exec python3 -m groundglass models "$@"
