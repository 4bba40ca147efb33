#!/usr/bin/env bash
# ADE20K 100-10 overlapped. GPU=0,1 METHOD=dkd MEMORY_SIZE=300 bash scripts/ade/overlapped/train_ade_100-10.sh
DATASET=ade TASK=100-10 SETTING=overlap
source "$(dirname "$0")/../../run_task.sh"
