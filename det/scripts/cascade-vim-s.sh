#!/usr/bin/env bash
# Train Cascade Mask R-CNN on Vim-S (80 M parameters, 53 M of them in pyramid and heads)
# on COCO 2017, images of 1024 pixels (4,096 tokens).
#
#   CKPT=vim_s_midclstok_80p5acc.pth DATA_PATH=/data/coco bash det/scripts/cascade-vim-s.sh [flags of train.py]
#
# Expected   not measured, and no published figure: the recipe of Vim-Ti, an extrapolation.
# Hardware   meant for 8 GPUs of 8 images each; fewer GPUs accumulate gradients. --grad-checkpointing saves memory.
# Hours      11.8 M images (100 epochs): 3,290 / (images per second of all GPUs). 82 hours at 8 x 5 images/s.
# Variables  CKPT DATA_PATH OUTPUT_DIR GPUS BATCH NNODES NODE_RANK MASTER_ADDR MASTER_PORT; see
#            vim/scripts/common.sh.
#
# The published recipe: AdamW at 1e-4, weight decay 0.1 (none for norms and position embeddings), layer-wise decay
# 0.837, 184,375 steps of 64 images with a warm-up of 250, the rate cut to a tenth at steps 163,889 and 177,546
# (epochs 88.89 and 96.30), large-scale jitter from 0.1 to 2.0. CKPT is a classifier's checkpoint (ImageNet-1K).

FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
LAUNCHED=$FOLDER/../train.py
DATA_FOLDER="COCO's folder: annotations/, train2017/, val2017/"
# shellcheck source=../../vim/scripts/common.sh
source "$FOLDER/../../vim/scripts/common.sh"

require_checkpoint
launch 64 8 \
    --model vim_small_patch16_224 \
    --finetune "$CKPT" \
    --lr 1e-4 --weight-decay 0.1 --layer-decay 0.837 --drop-path 0.1 \
    --epochs 100 --sched multistep \
    --input-size 1024 --scale-range 0.1 2.0 "$@"
