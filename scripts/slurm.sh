#!/usr/bin/env bash
# A step, or a whole task, on several nodes of a Slurm cluster; one task per GPU, started by srun.
#
#     sbatch --nodes 2 --gpus-per-node 4 --ntasks-per-node 4 scripts/slurm.sh \
#         train_voc.py --task_name 15-5 --task_step 0 --name DKD --lr 0.001 --bs 4 --pos_weight 2
#
# Slurm sends SIGUSR1 five minutes before the time is up, and SIGTERM when it takes the nodes back:
# the run saves its place inside the epoch and ends with code 75, and the job is queued again, to
# continue with -r auto. Change the lines below for your cluster (partition, account, time).
#SBATCH --job-name dkd
#SBATCH --time 24:00:00
#SBATCH --cpus-per-task 8
#SBATCH --signal USR1@300
#SBATCH --requeue
#SBATCH --open-mode append
#SBATCH --output slurm-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}" # sbatch runs a copy of this file from elsewhere

source scripts/await.sh
PYTHON=${PYTHON:-python}
[ "$PYTHON" = python ] && [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
export PYTHON MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# Every task of srun is a rank; the names are those that torchrun gives. When one has ended, srun
# ends the others after half a minute: with NCCL they may wait for it for an hour. Not at once
# (--kill-on-bad-exit), for ranks that were interrupted would not all end with code 75.
# shellcheck disable=SC2016 # the variables are those of the tasks
srun --kill-on-bad-exit=0 --wait=30 bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID \
    LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE exec "$PYTHON" "$@"' rank "$@" -r auto &
ranks=$!
trap ':' USR1 TERM # srun passes the signals to the ranks; this script waits for them to save
code=0
await "$ranks" || code=$?
if [ "$code" -eq 75 ]; then
    echo "interrupted and saved: queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
