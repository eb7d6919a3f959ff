#!/bin/sh
# Unpacks Debian's own builds of servers into a folder, with the libraries that this machine lacks: nothing is installed, no
# service is started, and root is not needed unless the machine has no package lists yet.
# Usage: fetch_debian_servers.sh FOLDER PACKAGE...; programs lie in FOLDER/usr/sbin and FOLDER/usr/bin afterwards.
set -eu
folder=$1
shift
if ! command -v apt-get >/dev/null 2>&1; then
  echo "fetch_debian_servers.sh: this is no Debian; put $* on PATH" >&2
  exit 1
fi
apt() {
  apt-get --option Acquire::Retries=3 --quiet --quiet "$@"
}
missing() {
  # What installing them would add to this machine; data alone (architecture "all") serves web pages that nobody opens here.
  apt-get install --simulate --quiet --no-install-recommends "$@" 2>/dev/null | sed -n '/\[all\])/d; s/^Inst \([^ ]*\) .*/\1/p'
}
for package in "$@"; do
  apt-cache show --no-all-versions "$package" >/dev/null 2>&1 || { apt update; break; }
done
mkdir -p "$folder"
target=$(cd "$folder" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
packages=$(missing "$@")
[ -n "$packages" ] || exit 0 # all are installed
# A list may name a version that its archive has replaced since.
# shellcheck disable=SC2086
apt download $packages || {
  apt update
  apt download $(missing "$@")
}
for archive in *.deb; do
  dpkg-deb --extract "$archive" "$target"
done
