#!/usr/bin/env bash
# What the compiler made of every CUDA kernel and variant that the bench cases launch: registers, spills, shared memory,
# occupancy, tensor-core and 16-byte load instructions, for sm_80, sm_90 and sm_100. Needs no GPU: NVRTC, cuobjdump and
# nvdisasm come from PyPI into target/cuda-tools.
#
#   scripts/kernel_report.sh [TILEWRIGHT]      writes benches/results/kernels-sm_XX.md
set -euo pipefail
cd "$(dirname "$0")/.."
program=${1:-target/release/tilewright}
tools=$PWD/target/cuda-tools
if [ ! -d "$tools/nvidia" ]; then
  python3 -m pip install --quiet --no-deps --upgrade --target "$tools" \
    "nvidia-cuda-nvrtc==13.0.*" "nvidia-cuda-cuobjdump==13.*" "nvidia-cuda-nvdisasm==13.*"
fi
export TILEWRIGHT_NVRTC=$tools
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p benches/results
for arch in 80 90 100; do
  "$program" kernels --arch $arch -o "$work/$arch" >/dev/null
  python3 scripts/kernel_report.py "$work/$arch" "$tools" >"$work/report.md"
  mv "$work/report.md" "benches/results/kernels-sm_$arch.md"
  tail -n 1 "benches/results/kernels-sm_$arch.md"
done
