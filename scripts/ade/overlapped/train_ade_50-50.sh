#!/usr/bin/env bash
# ADE20K 50-50 overlapped. GPU=0,1 METHOD=dkd MEMORY_SIZE=300 bash scripts/ade/overlapped/train_ade_50-50.sh
DATASET=ade TASK=50-50 SETTING=overlap
source "$(dirname "$0")/../../run_task.sh"
