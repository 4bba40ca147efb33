#!/usr/bin/env bash
# The project in a few minutes on a CPU: synthetic data, task 15-5 overlap, one base step, then the
# second step once with DKD and once with plain fine-tuning, a table and a picture. Rates and epochs
# of each step are the config's, the rest is the methods' recipes. Everything is written below demo/;
# a second call goes on where the first one stopped, DEMO_FRESH=1 starts anew.
set -euo pipefail
source "$(dirname "$0")/env.sh"

CONFIG=configs/demo.json RUNS=demo/runs
if [ "${DEMO_FRESH:-0}" = 1 ]; then rm -rf demo; fi
train() { # name, steps, flags...: a finished step is left alone, an interrupted one goes on
    "$PYTHON" train_voc.py -c "$CONFIG" -d cpu -r auto --name "$1" --task_step "$2" "${@:3}"
}

echo "== 1. a synthetic data set in VOC layout, 20 classes"
"$PYTHON" scripts/make_toy_voc.py --out demo/data --train 600 --val 100
echo "== 2. DKD: step 0, the 15 base classes, then step 1, 5 new ones"
train DKD all
echo "== 3. plain fine-tuning: step 1 again, from the same base step"
train finetune 0 --base "$RUNS/models/overlap_15-5_DKD/step_0"
train finetune 1 --method finetune
echo "== 4. evaluation of both weight files, as of any released one"
for name in DKD finetune; do
    "$PYTHON" eval_voc.py -d cpu --test -r "$RUNS/models/overlap_15-5_$name/step_1/checkpoint-epoch20.pth" --save_dir "$RUNS"
done
"$PYTHON" scripts/report.py "$RUNS" --out demo/report -d cpu
