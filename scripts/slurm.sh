#!/usr/bin/env bash
# A step, or a whole task, on several nodes of a Slurm cluster; one task per GPU, started by srun.
# To be submitted from the project's folder:
#
#     sbatch --nodes 2 --gpus-per-node 4 --ntasks-per-node 4 scripts/slurm.sh \
#         train_voc.py --task_name 15-5 --task_step 0 --name DKD --lr 0.001 --bs 4 --pos_weight 2
#
# Slurm sends SIGUSR1 five minutes before the time is up, and SIGTERM when it takes the nodes back:
# the run saves its place inside the epoch and ends with code 75. While the job's state is RUNNING
# then, it is queued again, to continue with -r auto (Slurm lets two minutes pass). In another state
# it is Slurm that ends it: cancelled or out of time it stays so, and what is preempted without
# notice, or loses a node, Slurm queues again itself. Other codes are the run's own, or srun's
# 128 + N for a rank that signal N killed; such a job has failed. `scancel --signal USR1 JOB` saves
# and queues again at any moment. Change the lines below for your cluster (partition, account, time).
#SBATCH --job-name dkd
#SBATCH --time 24:00:00
#SBATCH --cpus-per-task 8
#SBATCH --signal USR1@300
#SBATCH --requeue
#SBATCH --open-mode append
#SBATCH --output slurm-%j.log
set -uo pipefail
fail() {
    echo "slurm.sh: error: $1" >&2
    exit 2
}
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is no job of Slurm; submit it as the first lines of $0 show."
cd "${SLURM_SUBMIT_DIR:-$PWD}" # sbatch runs a copy of this file from elsewhere
[ -f scripts/await.sh ] || fail "$PWD is not the project's folder; submit the job from there."

source scripts/await.sh
PYTHON=${PYTHON:-python}
[ "$PYTHON" = python ] && [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
export PYTHON MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE
LOCAL_WORLD_SIZE=${SLURM_TASKS_PER_NODE:-$SLURM_NTASKS_PER_NODE}
LOCAL_WORLD_SIZE=${LOCAL_WORLD_SIZE%%[(,]*} # of "4(x2)"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# Every task of srun is a rank; the names are those that torchrun gives. When one has ended, srun
# ends the others after half a minute: with NCCL they may wait for it for an hour. Not at once
# (--kill-on-bad-exit), for ranks that were interrupted would not all end with code 75. Of sbatch's
# options srun takes over neither the cores of a task nor, after --export, the variables set here.
# shellcheck disable=SC2016 # the variables are those of the tasks
srun --kill-on-bad-exit=0 --wait=30 --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID \
    exec "$PYTHON" "$@"' rank "$@" -r auto &
ranks=$!
# Slurm signals the ranks itself, but a signal for the batch script alone (--signal B:USR1@300) has
# to be passed on. srun hands SIGUSR1 to its tasks; at SIGTERM it would kill them.
trap 'kill -USR1 "$ranks" 2>/dev/null' USR1 TERM
code=0
await "$ranks" || code=$?
trap : USR1 TERM
[ "$code" -eq 75 ] || exit "$code"

job=$SLURM_JOB_ID # one job of an array has the id of the array, which means all of them
[ "$job" = "${SLURM_ARRAY_JOB_ID:-}" ] && job+=_$SLURM_ARRAY_TASK_ID
unset "${!SQUEUE_@}" # the user's filters and formats
while state=$(squeue -h -j "$job" -o %T) && [ "$state" = SIGNALING ]; do
    sleep 1 # the signal is still on its way to some node; RUNNING follows, or COMPLETING
done
if [ "$state" != RUNNING ]; then
    echo "interrupted and saved: not queued again, because the job's state is ${state:-unknown}"
elif scontrol requeue "$job"; then
    echo "interrupted and saved: queued again"
else
    echo "interrupted and saved: Slurm did not queue it again; submit it once more to continue"
fi
exit "$code"
