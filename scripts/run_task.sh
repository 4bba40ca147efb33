# Sourced by the scripts of the published settings: trains every step of a task, then evaluates.
# Finished steps are skipped and an interrupted one goes on (-r auto), so a second call is safe.
# Arguments of the script go to every training call, for example --seed 3; what has a variable (NAME,
# EPOCHS, SAVE_DIR, …) is changed through the variable, for the script needs it to find the files.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
if [ "$MEMORY_SIZE" -gt 0 ]; then NAME=${NAME:-DKD-M}; else NAME=${NAME:-DKD}; fi
source scripts/await.sh

# Run a command so that signals to this script reach it: the run then saves where it stands and ends
# with code 75, and so does this script.
run() {
    "$@" &
    local child=$! code=0 signal
    for signal in TERM INT USR1; do trap "kill -$signal $child 2>/dev/null || true" "$signal"; done
    await "$child" || code=$?
    trap - TERM INT USR1
    return "$code"
}

commas=${GPU//[^,]/}
processes=$((${#commas} + 1))
if [ -z "${BS:-}" ] && [ $((GLOBAL_BATCH % processes)) -ne 0 ]; then
    echo "warning: the published global batch $GLOBAL_BATCH does not divide by $processes GPUs" >&2
fi
BS=${BS:-$((GLOBAL_BATCH / processes))} # per process; the published global batch by default
common=(-c "$CONFIG" -d "$GPU" --save_dir "$SAVE_DIR" --name "$NAME" --task_name "$TASK"
    --task_setting "$SETTING" --epochs "$EPOCHS" --batch_size "$BS"
    --mem_size "$MEMORY_SIZE" -r auto)
[ "$processes" -gt 1 ] && common+=(--multiprocessing_distributed)
[ -n "${DATA_DIR:-}" ] && common+=(--data_dir "$DATA_DIR")

for ((step = 0; step < STEPS; step++)); do
    flags=(--task_step "$step" --lr "$LR" --freeze_bn)
    if [ "$step" -eq 0 ]; then
        flags=(--task_step 0 --lr "$INIT_LR" --pos_weight "$INIT_POS_WEIGHT")
        [ -n "${BASE:-}" ] && flags+=(--base "$BASE") # another run's step 0, if it is the same
    fi
    run "$PYTHON" "train_$DATASET.py" "${common[@]}" "${flags[@]}" "$@"
done

evaluation=(-d "${GPU%%,*}" --test --save_dir "$SAVE_DIR")
[ -n "${DATA_DIR:-}" ] && evaluation+=(--data_dir "$DATA_DIR")
run "$PYTHON" "eval_$DATASET.py" "${evaluation[@]}" \
    -r "$SAVE_DIR/models/${SETTING}_${TASK}_$NAME/step_$((STEPS - 1))/checkpoint-epoch$EPOCHS.pth"
