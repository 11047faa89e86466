#!/usr/bin/env bash
# Fine-tune Vim-B at stride 8 (730 tokens) on ImageNet-1K, from its stride-16 weights.
#
#   CKPT=vim_b_midclstok_81p9acc.pth DATA_PATH=/data/imagenet bash vim/scripts/ft-vim-b.sh [flags of main.py]
#
# Expected   not measured, and no published figure: neither weights nor a recipe of this size are published at
#            stride 8. This is the recipe of tiny and small, an extrapolation.
# Hardware   meant for 8 GPUs of 32 images each and four passes per step; fewer GPUs accumulate more.
# Hours      38 M images of 3.7 times the tokens: 10,700 / (images per second of all GPUs).
#            22 hours at 8 x 60 images/s.
# Variables  CKPT DATA_PATH OUTPUT_DIR GPUS BATCH NNODES NODE_RANK MASTER_ADDR MASTER_PORT; see common.sh.
#
# At the whole batch of 1024 the scaled learning rate is 1e-5, equal to --min-lr and --warmup-lr: a constant.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

require_checkpoint
launch 1024 32 \
    --model vim_base_patch16_stride8_224 \
    --finetune "$CKPT" \
    --epochs 30 --lr 5e-6 --min-lr 1e-5 --warmup-lr 1e-5 --weight-decay 1e-8 --drop-path 0.0 "$@"
