#!/usr/bin/env bash
# ADE20K 100-10 overlapped: 6 steps. GPU=0,1 BS=12 bash scripts/ade/overlapped/train_ade_100-10.sh
DATASET=ade TASK=100-10 SETTING=overlap STEPS=6 GLOBAL_BATCH=24
SAVE_DIR=${SAVE_DIR:-saved_ade} CONFIG=${CONFIG:-configs/config_ade.json}
GPU=${GPU:-0} EPOCHS=${EPOCHS:-100} MEMORY_SIZE=${MEMORY_SIZE:-0} # 300: DKD-M
INIT_LR=${INIT_LR:-0.0025} INIT_POS_WEIGHT=${INIT_POS_WEIGHT:-35} LR=${LR:-0.00025}
source "$(dirname "$0")/../../run_task.sh"
