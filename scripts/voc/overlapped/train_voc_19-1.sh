#!/usr/bin/env bash
# PASCAL VOC 19-1 overlapped. GPU=0,1 METHOD=dkd MEMORY_SIZE=100 bash scripts/voc/overlapped/train_voc_19-1.sh
DATASET=voc TASK=19-1 SETTING=overlap
source "$(dirname "$0")/../../run_task.sh"
