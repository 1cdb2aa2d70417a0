#!/usr/bin/env bash
# The engine's tests under AddressSanitizer and UndefinedBehaviorSanitizer, then those with threads under ThreadSanitizer.
# Usage: scripts/sanitize.sh [build folder]
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build/sanitize}
jobs=${JOBS:-$(nproc)}
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi

# $1: sanitizers; $2: regular expression of the tests to build and run; further: environment of the tests.
check() {
  local sanitizers=$1 tests=$2 folder=$build/${1//,/-}
  shift 2
  echo "== $sanitizers"
  cmake -S "$root" -B "$folder" "${generator[@]}" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DESPALIER_PYTHON=OFF -DESPALIER_TESTS=ON \
    "-DESPALIER_SANITIZE=$sanitizers" >/dev/null
  cmake --build "$folder" --parallel "$jobs"
  env "$@" ctest --test-dir "$folder" --output-on-failure --no-tests=error --parallel "$jobs" --tests-regex "$tests"
}

check address,undefined . ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1
check thread '^(program|images|team)$' TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1
