#!/usr/bin/env bash
# Pre-train Vim-S (25.80 M parameters, 224 px, stride 16) on ImageNet-1K.
#
#   DATA_PATH=/data/imagenet bash vim/scripts/pt-vim-s.sh [flags of main.py]
#
# Expected   80.5 % top-1, 95.1 % top-5 (the paper's run of this recipe, 300 epochs).
# Hardware   published with 8 GPUs of 64 images each; fewer GPUs accumulate gradients.
# Hours      384 M images: 107,000 / (images per second of all GPUs). 27 hours at 8 x 500 images/s.
# Variables  DATA_PATH OUTPUT_DIR GPUS BATCH NNODES NODE_RANK MASTER_ADDR MASTER_PORT; see common.sh.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

launch 512 64 \
    --model vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --epochs 300 --lr 1e-3 --weight-decay 0.05 --drop-path 0.05 "$@"
