#!/usr/bin/env bash
# PASCAL VOC 15-1 disjoint. GPU=0,1 METHOD=dkd MEMORY_SIZE=100 bash scripts/voc/disjoint/train_voc_15-1.sh
DATASET=voc TASK=15-1 SETTING=disjoint
source "$(dirname "$0")/../../run_task.sh"
