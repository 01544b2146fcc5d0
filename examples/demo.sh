#!/bin/sh
# The demonstration behind `make demo`: from nothing to an image for two platforms and an archive of it.
#
# Everything stays below .work/ in the work tree; `make clean` removes it. A second run finds everything done.
set -eu

repository=$(cd "$(dirname "$0")/.." && pwd)
cd "$repository"
work=.work/demo
slipway=${SLIPWAY_BIN:-${CARGO_TARGET_DIR:-target}/release/slipway}
image=slipway.local/hello:latest
archive=$work/hello.oci.tar
platforms=linux/amd64,linux/arm64
SLIPWAY_ROOT=$repository/$work/root
export SLIPWAY_ROOT

now() { date +%s%N; }
began=$(now)
step_began=$began
say() { printf '\n== %s\n' "$*"; }
done_in() {
    end=$(now)
    printf '   %s (%d.%02d s)\n' "$1" $(((end - step_began) / 1000000000)) $(((end - step_began) / 10000000 % 100))
    step_began=$end
}

case $(uname -m) in
x86_64) foreign=linux/arm64 ;;
*) foreign=linux/amd64 ;;
esac

say "What the demo needs"
sh tests/install-tools.sh qemu-aarch64-static:qemu-user-static qemu-x86_64-static:qemu-user-static \
    python3:python3 flock:util-linux
done_in "tools are there"

if [ -z "${SLIPWAY_BIN:-}" ]; then
    say "slipway itself, as a release build"
    sh tests/install-tools.sh cc:gcc /usr/include/stdlib.h:libc6-dev
    cargo build --release --locked --package slipway-cli
    done_in "$slipway"
fi

say "Base images from Debian packages, for both platforms"
mkdir -p "$work"
base=$(sh tests/base-image.sh .work/base)
loaded=$work/base.loaded
stamp=$(cat .work/base/recipe)
if [ "$(cat "$loaded" 2>/dev/null)" = "$stamp" ] && "$slipway" inspect slipway.local/debian:dev >/dev/null 2>&1; then
    done_in "in the store since an earlier run"
else
    "$slipway" load --input "$base"
    printf '%s\n' "$stamp" >"$loaded"
    done_in "loaded into the store"
fi

say "examples/hello for $platforms"
"$slipway" build --progress=plain --platform "$platforms" --tag "$image" examples/hello
done_in "built"

say "The image in the store, and as an OCI archive"
"$slipway" images --tree
"$slipway" save --output "$archive" "$image"
done_in "$archive"

say "The finished image, run on $foreign under emulation"
"$slipway" run --rm --platform "$foreign" "$image" --self-test
done_in "it answers"

end=$(now)
say "Done in $(((end - began) / 1000000000)).$(printf %02d $(((end - began) / 10000000 % 100))) s"
cat <<END
   image      $image for $platforms
   store      $work/root          (content/ in it is an OCI layout; see it with: SLIPWAY_ROOT=$work/root $slipway images --tree)
   archive    $archive
   try        SLIPWAY_ROOT=$work/root $slipway run --rm $image
              and open http://127.0.0.1:8080/ in a browser
   again      make demo           (every step comes from the cache)
END
