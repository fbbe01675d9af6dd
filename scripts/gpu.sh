#!/usr/bin/env bash
# For a machine with an NVIDIA GPU: checks every CUDA kernel on the driver, runs compute-sanitizer over a small pass where
# it is installed, and times training steps. Needs a release binary and NVRTC (`pip install nvidia-cuda-nvrtc`), no Rust and
# no network.
#
#   scripts/gpu.sh check|sanitizer|bench|all [TILEWRIGHT]      writes gpu-results/
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

check() {
  for precision in f32 tf32 bf16; do
    echo "== check, $precision"
    "$program" check --backend cuda --variants --precision $precision --json >"$out/check-$precision.json" || failed=1
    python3 - "$out/check-$precision.json" <<'PY'
import json, sys
rows = json.load(open(sys.argv[1]))["results"]
for r in rows:
    if r["checked"] != "gradient":
        print(f"{r['op']:20} {r['runs']:4} runs {r['failed']:3} failed, worst {r['worst']}")
PY
  done
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

bench() {
  for model in cnn_r14 vit_p4_e128_d6; do
    for precision in f32 bf16; do
      echo "== training $model, $precision"
      rm -rf "$out/run"
      "$program" train -m $model -d synthetic:10x32 --epochs 2 --batch-size 128 --backend cuda --precision $precision \
        --output "$out/run" --json >"$out/train-$model-$precision.json" || failed=1
    done
  done
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
