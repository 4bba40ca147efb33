#!/usr/bin/env bash
# PASCAL VOC 5-3 overlapped. GPU=0,1 METHOD=dkd MEMORY_SIZE=100 bash scripts/voc/overlapped/train_voc_5-3.sh
DATASET=voc TASK=5-3 SETTING=overlap
source "$(dirname "$0")/../../run_task.sh"
