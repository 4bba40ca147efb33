#!/usr/bin/env bash
# PASCAL VOC 10-1 overlapped. GPU=0,1 METHOD=dkd MEMORY_SIZE=100 bash scripts/voc/overlapped/train_voc_10-1.sh
DATASET=voc TASK=10-1 SETTING=overlap
source "$(dirname "$0")/../../run_task.sh"
