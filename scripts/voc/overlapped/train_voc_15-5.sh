#!/usr/bin/env bash
# PASCAL VOC 15-5 overlapped. GPU=0,1 METHOD=dkd MEMORY_SIZE=100 bash scripts/voc/overlapped/train_voc_15-5.sh
DATASET=voc TASK=15-5 SETTING=overlap
source "$(dirname "$0")/../../run_task.sh"
