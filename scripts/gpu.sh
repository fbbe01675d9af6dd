#!/usr/bin/env bash
# For a machine with an NVIDIA GPU: checks every CUDA kernel on the driver and every WGSL kernel on Vulkan where that is
# installed, runs compute-sanitizer over a small pass where it is installed, and times kernels beside cuBLAS and cuDNN
# (`bench` finds them, also as Python packages), and training and inference beside PyTorch where that is installed.
# Needs a release binary and NVRTC (`pip install nvidia-cuda-nvrtc`), no Rust and no network. Each run keeps its JSON.
#
#   scripts/gpu.sh check|sanitizer|bench|all [TILEWRIGHT]      writes gpu-results/
#
# NVRTC compiles what a step needs on its first run (tens of seconds); the cache keeps it.
set -euo pipefail
what=${1:-all}
program=${2:-target/release/tilewright}
out=gpu-results
mkdir -p "$out"
command -v "$program" >/dev/null || { echo "there is no program at $program; give its path as second argument" >&2; exit 2; }
"$program" devices --json >"$out/devices.json"
python3 - "$out/devices.json" <<'PY'
import json, sys
cuda = next(b for b in json.load(open(sys.argv[1]))["backends"] if b["name"] == "cuda")
if not cuda["available"]:
    sys.exit(f"no CUDA here: {cuda['reason'] or cuda['nvrtc']['reason']}")
print("\n".join(cuda["devices"]))
PY

# name, then the arguments of `check`: a line an op.
checked() {
  local name=$1
  shift
  echo "== check, $name"
  "$program" check --variants --json "$@" >"$out/check-$name.json" || failed=1
  python3 - "$out/check-$name.json" <<'PY'
import json, sys
rows = json.load(open(sys.argv[1]))["results"]
for r in rows:
    if r["checked"] != "gradient":
        worst = "not finite" if r["worst"] is None else f"{r['worst']:.3f}"
        print(f"{r['op']:20} {r['runs']:4} runs {r['failed']:3} failed, worst {worst} of what is allowed")
PY
}

check() {
  for precision in f32 tf32 bf16; do
    checked $precision --backend cuda --precision $precision
  done
  local adapter
  adapter=$(python3 - "$out/devices.json" <<'PY'
import json, sys
wgpu = next(b for b in json.load(open(sys.argv[1]))["backends"] if b["name"] == "wgpu")
real = [a["name"] for a in wgpu.get("adapters", []) if a["kind"] != "software"]
print(real[0] if real else "")
PY
  )
  if [ -n "$adapter" ]; then
    checked wgpu --backend "wgpu:$adapter"
  else
    echo "== check, wgpu: no Vulkan adapter of a GPU (is libvulkan1 installed?): left out"
  fi
}

sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "== compute-sanitizer is not installed: left out"
    return
  fi
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== compute-sanitizer $tool"
    for case in 'linear(n=5,c=7,k=3)' 'layer_norm(n=2,t=65,c=128)' 'batch_norm(n=1,h=7,w=7,c=17,relu=1)'; do
      compute-sanitizer --tool $tool --error-exitcode 1 --log-file "$out/$tool.log" \
        "$program" check "$case" --backend cuda --no-graph >/dev/null || { failed=1; tail -n 20 "$out/$tool.log"; }
    done
  done
}

# name, then the command: its JSON is kept as NAME.json, and a failure does not stop the others.
keep() {
  local name=$1
  shift
  echo "== $name"
  "$program" "$@" --backend cuda --json >"$out/$name.json" || failed=1
}

bench() {
  for precision in f32 tf32 bf16; do
    for op in linear conv2d attention window_attention layer_norm batch_norm act softmax_ce adamw; do
      keep "kernel-$op-$precision" bench $op --precision $precision
    done
    for step in "resnet50 64" "vit_b_16 64" "cnn_r14 128" "vit_p4_e128_d6 128"; do
      set -- $step
      keep "model-$1-$precision" bench $1 --batch $2 --precision $precision
    done
    python3 "$(dirname "$0")/gpu_peers.py" "$out" $precision | tee "$out/table-$precision.md" || failed=1
  done
  # The same without the CUDA graph: what replay gains.
  keep "model-cnn_r14-nograph" bench cnn_r14 --batch 128 --precision bf16 --no-graph
  keep "cold-cnn_r14" bench cnn_r14 --batch 128 --train --cold
}

failed=0
case $what in
  check) check ;;
  sanitizer) sanitizer ;;
  bench) bench ;;
  all) check; sanitizer; bench ;;
  *) echo "scripts/gpu.sh check|sanitizer|bench|all [TILEWRIGHT]" >&2; exit 2 ;;
esac
echo "results in $out/"
exit $failed
