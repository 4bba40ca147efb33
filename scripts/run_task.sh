# Sourced by the scripts of the published settings: trains every step of a task, and tests each.
# Finished steps are skipped and an interrupted one goes on, so a second call is safe. A method
# trains by its recipe (configs/recipes); what is set here or given as an argument goes over it.
#   GPU=0,1        which GPUs, one process each; cpu; default: the first GPU, if there is one
#   METHOD=dkd     how to train
#   MEMORY_SIZE=0  exemplars (VOC 100, ADE 300)       BASE=DIR       another run's finished step_0
#   JOINT=1        joint training, the upper bound: each step from scratch on all classes up to it
#   STEP=all       or one step, or a range: 1-5       NAME=…         folder of the run
#   EPOCHS, BS (per process), SAVE_DIR, DATA_DIR, CONFIG, PYTHON
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
METHOD=${METHOD:-dkd}
[ "$METHOD" = dkd ] && LABEL=DKD || LABEL=$METHOD
if [ "${MEMORY_SIZE:-0}" -gt 0 ]; then LABEL+=-M; fi
NAME=${NAME:-$LABEL}
flags=(--task_name "$TASK" --task_setting "$SETTING" --task_step "${STEP:-all}" -r auto
    --method "$METHOD" --name "$NAME" --save_dir "${SAVE_DIR:-saved_$DATASET}")
[ -n "${GPU:-}" ] && flags+=(-d "$GPU")
case ${GPU:-} in *,*) flags+=(--multiprocessing_distributed) ;; esac
[ "${JOINT:-0}" = 1 ] && flags+=(--joint)
[ -n "${CONFIG:-}" ] && flags+=(-c "$CONFIG")
[ -n "${MEMORY_SIZE:-}" ] && flags+=(--mem_size "$MEMORY_SIZE")
[ -n "${EPOCHS:-}" ] && flags+=(--epochs "$EPOCHS")
[ -n "${BS:-}" ] && flags+=(--batch_size "$BS")
[ -n "${BASE:-}" ] && flags+=(--base "$BASE")
[ -n "${DATA_DIR:-}" ] && flags+=(--data_dir "$DATA_DIR")
exec "$PYTHON" "train_$DATASET.py" "${flags[@]}" "$@"
