#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the gpu-marked tests, every benchmark, the plots.
#   bash benchmarks/gpu_session.sh [FOLDER]      records and log go there (default: benchmarks/results)
# Steps go on after a failure; the last line names those that failed. SMOKE=1 runs tiny sizes, also without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
RECORDS=${1:-benchmarks/results}
PYTHON=${PYTHON:-python3}
SMOKE=${SMOKE:+--smoke}
mkdir -p "$RECORDS"
failed=()

step() {
  local name=$1
  shift
  echo "== $name: $*"
  timeout "${STEP_SECONDS:-420}" "$@" 2>&1 | tee "$RECORDS/gpu_$name.log" || failed+=("$name")
}

step doctor "$PYTHON" -m ftfast doctor
step tests "$PYTHON" -m pytest -q -m gpu tests
step losses "$PYTHON" -m benchmarks losses ${SMOKE:-} --out "$RECORDS"
step topk "$PYTHON" -m benchmarks topk ${SMOKE:-}
step weightspace "$PYTHON" -m benchmarks weightspace ${SMOKE:-}
# A training step of one GPU: dense and fused loss, and the largest batch that each survives; g/14 through ZeRO.
train() {
  local name=$1 model=$2
  shift 2
  [ -n "$SMOKE" ] && model=tiny-clip-v1 || set -- "$@" --largest
  step "train_$name" "$PYTHON" -m benchmarks train ${SMOKE:-} --name "train_$name" --model "$model" --data random "$@"
}
train vit_b16 ViT-B-16 --batch 256 --precision amp_bf16
train vit_l14 ViT-L-14 --batch 128 --precision amp_bf16 --grad-checkpointing
train vit_g14 ViT-g-14 --batch 64 --precision pure_bf16 --zero 1 --grad-checkpointing
step plot "$PYTHON" -m benchmarks plot
[ "$RECORDS" = benchmarks/results ] || cp benchmarks/results/*_cuda.json benchmarks/results/*.png "$RECORDS" 2>/dev/null
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all steps passed"
