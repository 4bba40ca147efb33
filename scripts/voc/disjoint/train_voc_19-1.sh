#!/usr/bin/env bash
# PASCAL VOC 19-1 disjoint: 2 steps. GPU=0,1 BS=16 bash scripts/voc/disjoint/train_voc_19-1.sh
DATASET=voc TASK=19-1 SETTING=disjoint STEPS=2 GLOBAL_BATCH=32
SAVE_DIR=${SAVE_DIR:-saved_voc} CONFIG=${CONFIG:-configs/config_voc.json}
GPU=${GPU:-0} EPOCHS=${EPOCHS:-60} MEMORY_SIZE=${MEMORY_SIZE:-0} # 100: DKD-M
INIT_LR=${INIT_LR:-0.001} INIT_POS_WEIGHT=${INIT_POS_WEIGHT:-2} LR=${LR:-0.0001}
source "$(dirname "$0")/../../run_task.sh"
