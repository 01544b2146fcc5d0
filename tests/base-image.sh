#!/bin/sh
# Makes the base images that the demo, the end-to-end tests and the benchmarks start from.
#
#   base-image.sh [DIRECTORY]          prints the path of the archive
#
# Two images from Debian packages, each for linux/amd64 and linux/arm64, in one OCI archive:
#
#   slipway.local/debian:base          a shell, the usual commands, the C library
#   slipway.local/debian:dev           the same, and a small C compiler
#
# The packages come through the machine's own apt configuration, into an apt state of our own: neither the package
# lists nor the foreign architectures of the machine are touched, and nothing here needs root. Equal packages give
# equal bytes. When the archive is there already, nothing is done.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
work=${1:-$here/../.work/base}
architectures=${SLIPWAY_BASE_ARCHITECTURES:-amd64 arm64}
base='base-files busybox-static libc6 libgcc-s1 libcap2 libcap2-bin netbase'
dev='tcc libc6-dev linux-libc-dev libcrypt-dev'

mkdir -p "$work"
work=$(cd "$work" && pwd)
recipe=$work/recipe
archive=$work/base.oci.tar
# The stamp is what the archive was made from; a changed list or script makes a new one.
wanted=$(cat "$here/base-image.sh" "$here/oci_image.py" | cksum; echo "$architectures")
up_to_date() { [ -f "$archive" ] && [ "$(cat "$recipe" 2>/dev/null)" = "$wanted" ]; }

if up_to_date; then
    echo "$archive"
    exit 0
fi

sh "$here/install-tools.sh" python3:python3 dpkg-deb:dpkg flock:util-linux >&2
# Test processes that start together wait for the first of them.
exec 9>"$work/lock"
flock 9
if up_to_date; then
    echo "$archive"
    exit 0
fi

echo "base-image: fetching Debian packages for $architectures" >&2
layers=
for architecture in $architectures; do
    state=$work/apt/$architecture
    debs=$work/debs/$architecture
    rm -rf "$debs"
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$debs/base" "$debs/dev"
    : >"$state/status"
    apt() {
        # A second architecture in the sources' own options would win over ours; root's download user cannot enter
        # private directories.
        apt-get --quiet=2 \
            -o APT::Architecture="$architecture" -o APT::Architectures::="$architecture" -o APT::Architectures="$architecture" \
            -o Dir::State="$state" -o Dir::State::status="$state/status" -o Dir::State::lists="$state/lists" \
            -o Dir::Cache="$state/cache" -o APT::Sandbox::User="$(id -un)" \
            -o APT::Get::List-Cleanup=true -o Acquire::Languages=none "$@" </dev/null >&2
    }
    apt update
    # shellcheck disable=SC2086 # the lists are meant to be split
    (cd "$debs/base" && apt download $base)
    # shellcheck disable=SC2086
    (cd "$debs/dev" && apt download $dev)
    layers="$layers $architecture=$debs/base,$debs/dev"
done

# shellcheck disable=SC2086
python3 "$here/oci_image.py" "$archive.new" $layers
mv "$archive.new" "$archive"
rm -rf "$work/apt" "$work/debs"
printf '%s\n' "$wanted" >"$recipe"
echo "$archive"
