#!/usr/bin/env bash
# Cross-compiles the engine's tests for aarch64 and runs them under QEMU: on x86 this is what runs the NEON kernels.
# Needs Debian's g++-aarch64-linux-gnu and qemu-user-static (or qemu-user); without them it says so and succeeds.
# Usage: scripts/aarch64.sh [build folder]
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build/aarch64}
jobs=${JOBS:-$(nproc)}
compiler=${AARCH64_CXX:-aarch64-linux-gnu-g++}
emulator=${AARCH64_EMULATOR:-$(command -v qemu-aarch64-static || command -v qemu-aarch64 || echo qemu-aarch64-static)}

for tool in "$compiler" "$emulator"; do
  if ! command -v "$tool" >/dev/null; then
    echo "aarch64: skipped, there is no $tool (Debian: apt install g++-aarch64-linux-gnu qemu-user-static)"
    exit 0
  fi
done
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi

cmake -S "$root" -B "$build" "${generator[@]}" -DESPALIER_PYTHON=OFF -DESPALIER_TESTS=ON \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 "-DCMAKE_CXX_COMPILER=$compiler" \
  -DCMAKE_EXE_LINKER_FLAGS=-static "-DCMAKE_CROSSCOMPILING_EMULATOR=$emulator" >/dev/null
cmake --build "$build" --parallel "$jobs"
ctest --test-dir "$build" --output-on-failure --no-tests=error --parallel "$jobs"
