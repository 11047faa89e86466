#!/usr/bin/env bash
# Fine-tune Vim-S at stride 8 (730 tokens) on ImageNet-1K, from its stride-16 weights.
#
#   CKPT=vim_s_midclstok_80p5acc.pth DATA_PATH=/data/imagenet bash vim/scripts/ft-vim-s.sh [flags of main.py]
#
# Expected   81.6 % top-1, 95.4 % top-5 (the paper's run of this recipe, 30 epochs).
# Hardware   published with 8 GPUs of 128 images each; fewer GPUs accumulate gradients.
# Hours      38 M images of 3.7 times the tokens: 10,700 / (images per second of all GPUs).
#            8 hours at 8 x 160 images/s.
# Variables  CKPT DATA_PATH OUTPUT_DIR GPUS BATCH NNODES NODE_RANK MASTER_ADDR MASTER_PORT; see common.sh.
#
# At the whole batch of 1024 the scaled learning rate is 1e-5, equal to --min-lr and --warmup-lr: a constant.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

require_checkpoint
launch 1024 128 \
    --model vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --finetune "$CKPT" \
    --epochs 30 --lr 5e-6 --min-lr 1e-5 --warmup-lr 1e-5 --weight-decay 1e-8 --drop-path 0.0 "$@"
