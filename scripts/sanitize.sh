#!/bin/sh
# The engine's own tests under AddressSanitizer and UndefinedBehaviorSanitizer, then the threaded ones under
# ThreadSanitizer. Needs a C++20 compiler, and cmake and ninja on the path.
set -eu
cd "$(dirname "$0")/.."

check() { # name, sanitizers, tests to run (all when none)
  name=$1 sanitizers=$2
  shift 2
  cmake -S . -B "build/$name" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DESPALIER_PYTHON=OFF -DESPALIER_TESTS=ON \
    -DESPALIER_SANITIZE="$sanitizers" >/dev/null
  cmake --build "build/$name"
  "build/$name/csrc/tests/espalier_tests" "$@"
}

check address address,undefined
check thread thread answers several
