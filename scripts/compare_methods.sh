#!/usr/bin/env bash
# Every method side by side on synthetic data, in a quarter to half an hour on two CPU cores: tasks 15-5 and
# 15-3-2 (three steps), two seeds; fine-tuning and joint training as bounds. Ends with a report: a table (mean and
# deviation over the seeds), curves, pictures. All is written below demo/methods; finished steps are left alone,
# so a second call goes on where the first one stopped.
#   SEEDS="1 2 3"  OUT=DIR; arguments go to scripts/compare_methods.py, such as --methods mib plop
set -euo pipefail
source "$(dirname "$0")/env.sh"

OUT=${OUT:-demo/methods} SEEDS=${SEEDS:-1 2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the seeds run side by side
"$PYTHON" scripts/make_toy_voc.py --out "$OUT/data" --train 400 --val 100 --saliency "$OUT/saliency"
jobs=()
for seed in $SEEDS; do
    "$PYTHON" scripts/compare_methods.py --out "$OUT" --data_dir "$OUT/data" --saliency_dir "$OUT/saliency" --seed "$seed" "$@" &
    jobs+=($!)
done
trap 'kill "${jobs[@]}" 2>/dev/null || true' EXIT
for job in "${jobs[@]}"; do wait "$job"; done
"$PYTHON" scripts/report.py "$OUT/runs" --out "$OUT/report"
