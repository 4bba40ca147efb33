#!/usr/bin/env bash
# PASCAL VOC 19-1 disjoint. GPU=0,1 METHOD=dkd MEMORY_SIZE=100 bash scripts/voc/disjoint/train_voc_19-1.sh
DATASET=voc TASK=19-1 SETTING=disjoint
source "$(dirname "$0")/../../run_task.sh"
