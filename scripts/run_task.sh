# Sourced by the scripts of the published settings: trains every step of a task, then evaluates.
# Finished steps are skipped and an interrupted one goes on, so a second call is safe. Arguments of
# the script go to every training call, for example --seed 3; what has a variable (NAME, EPOCHS,
# SAVE_DIR, …) is changed through the variable, for the script needs it to find the files.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
commas=${GPU//[^,]/}
processes=$((${#commas} + 1))
if [ -z "${BS:-}" ] && [ $((GLOBAL_BATCH % processes)) -ne 0 ]; then
    echo "warning: the published global batch $GLOBAL_BATCH does not divide by $processes GPUs" >&2
fi
BS=${BS:-$((GLOBAL_BATCH / processes))} # per process; the published global batch by default
common=(-c "$CONFIG" -d "$GPU" --save_dir "$SAVE_DIR" --name "$NAME" --task_name "$TASK"
    --task_setting "$SETTING" --epochs "$EPOCHS" --batch_size "$BS"
    --mem_size "$MEMORY_SIZE")
[ "$processes" -gt 1 ] && common+=(--multiprocessing_distributed)
[ -n "${DATA_DIR:-}" ] && common+=(--data_dir "$DATA_DIR")

run=${SETTING}_${TASK}_$NAME
for ((step = 0; step < STEPS; step++)); do
    if [ -e "$SAVE_DIR/log/$run/step_$step/metrics.json" ]; then
        echo "step $step of $run is finished: skipped"
        continue
    fi
    flags=(--task_step "$step" --lr "$LR" --freeze_bn)
    if [ "$step" -eq 0 ]; then
        flags=(--task_step 0 --lr "$INIT_LR" --pos_weight "$INIT_POS_WEIGHT")
    fi
    last=$SAVE_DIR/models/$run/step_$step/last.pth
    [ -e "$last" ] && flags+=(-r "$last")
    "$PYTHON" "train_$DATASET.py" "${common[@]}" "${flags[@]}" "$@"
done

evaluation=(-d "${GPU%%,*}" --test --save_dir "$SAVE_DIR")
[ -n "${DATA_DIR:-}" ] && evaluation+=(--data_dir "$DATA_DIR")
"$PYTHON" "eval_$DATASET.py" "${evaluation[@]}" \
    -r "$SAVE_DIR/models/$run/step_$((STEPS - 1))/checkpoint-epoch$EPOCHS.pth"
