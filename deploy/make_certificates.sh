#!/bin/sh
# Makes what a trial deployment needs into FOLDER (by default deploy/secrets): a CA of its own, the balancer's certificate, one
# for a client, the control key and Grafana's password. For development; in production the CA is yours, and so are these files.
# Usage: make_certificates.sh [FOLDER [NAME...]]    NAME: further host names or addresses of the balancer
set -eu
umask 077
folder=${1:-$(dirname "$0")/secrets}
[ $# -eq 0 ] || shift
if [ -e "$folder" ]; then
  echo "make_certificates.sh: $folder exists; nothing was changed. Remove it to start anew" >&2
  exit 1
fi
days=365
names=DNS:localhost,DNS:lb,IP:127.0.0.1
for name in "$@"; do
  case $name in
    *[!0-9.]*) names=$names,DNS:$name ;;
    *) names=$names,IP:$name ;;
  esac
done
mkdir -p "$(dirname "$folder")"
made=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$made"' EXIT

new_key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1"; }

# issue NAME SUBJECT EXTENSION...: a key and a certificate by our CA
issue() {
  new_key "$made/$1.key"
  printf '%s\n' "basicConstraints=critical,CA:FALSE" "$3" "$4" >"$made/extensions"
  openssl req -new -key "$made/$1.key" -subj "/CN=$2" |
    openssl x509 -req -days "$days" -CA "$made/ca.pem" -CAkey "$made/ca.key" -CAcreateserial \
      -extfile "$made/extensions" -out "$made/$1.pem" 2>/dev/null
}

new_key "$made/ca.key"
openssl req -new -x509 -days "$days" -key "$made/ca.key" -subj "/CN=Groundglass test CA" -out "$made/ca.pem" \
  -addext keyUsage=critical,keyCertSign,cRLSign
issue server localhost "extendedKeyUsage=serverAuth" "subjectAltName=$names"
issue client client "extendedKeyUsage=clientAuth" "subjectAltName=DNS:client"
cat "$made/server.pem" "$made/server.key" >"$made/lb.pem"
cp "$made/ca.pem" "$made/client-ca.pem"
openssl rand -hex 32 >"$made/control.key"
openssl rand -hex 12 >"$made/grafana.password"
rm "$made/extensions" "$made/server.pem" "$made/server.key" "$made"/*.srl

# The folder keeps others on this machine out. The files are mounted one by one, and read by the containers' users.
chmod 644 "$made"/*
chmod 600 "$made/ca.key"
mv "$made" "$folder"
echo "$folder: ca.pem, lb.pem, client-ca.pem, client.pem, client.key, control.key, grafana.password"
