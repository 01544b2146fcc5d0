#!/bin/sh
# Runs tests with cargo-nextest where it is installed, with plain `cargo test` otherwise. The same tests either way.
#
#   run-tests.sh CARGO-ARGUMENTS
#
# Documentation tests are what nextest leaves out, so they are run beside it.
set -eu

cargo=${CARGO:-cargo}
if ! "$cargo" nextest --version >/dev/null 2>&1; then
    exec "$cargo" test --locked "$@"
fi
"$cargo" nextest run --locked --no-tests pass "$@"
case " $* " in
*" --workspace "*) "$cargo" test --locked --doc "$@" ;;
esac
