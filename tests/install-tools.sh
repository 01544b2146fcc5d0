#!/bin/sh
# Makes sure that commands are there, and installs the Debian packages of those that are not.
#
#   install-tools.sh COMMAND:PACKAGE …
#
# Costs a few milliseconds when nothing is missing. `COMMAND` may be a path when the file is not a command.
set -eu

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
missing=
for pair; do
    tool=${pair%%:*} package=${pair#*:}
    case $tool in
    /*) [ -e "$tool" ] || missing="$missing $package" ;;
    *) command -v "$tool" >/dev/null 2>&1 || missing="$missing $package" ;;
    esac
done
missing=${missing# }
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "install-tools: not a Debian machine; install what provides: $missing" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "install-tools: packages are missing and only root may install them; run: apt-get install $missing" >&2
    exit 1
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Another apt may be at work, on a machine that has just started for example: wait for its lock.
install() {
    # shellcheck disable=SC2086 # the list is meant to be split
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
        install --yes --quiet --no-install-recommends $missing >"$log" 2>&1 </dev/null
}
echo "install-tools: installing $missing" >&2
# The package lists may be absent or may name versions that the mirror has dropped: then fetch them once.
install || { apt-get -o DPkg::Lock::Timeout=300 --quiet update >"$log" 2>&1 && install; } || {
    cat "$log" >&2
    echo "install-tools: cannot install $missing" >&2
    exit 1
}
