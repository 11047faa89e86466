#!/usr/bin/env bash
# Pre-train Vim-Ti (7.15 M parameters, 224 px, stride 16) on ImageNet-1K.
#
#   DATA_PATH=/data/imagenet bash vim/scripts/pt-vim-t.sh [flags of main.py]
#
# Expected   76.1 % top-1, 93.0 % top-5 (the paper's run of this recipe, 300 epochs).
# Hardware   published with 8 GPUs of 128 images each in float32; fewer GPUs accumulate gradients.
# Hours      384 M images: 107,000 / (images per second of all GPUs). 13 hours at 8 x 1,000 images/s.
# Variables  DATA_PATH OUTPUT_DIR GPUS BATCH NNODES NODE_RANK MASTER_ADDR MASTER_PORT; see common.sh.

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

launch 1024 128 \
    --model vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2 \
    --epochs 300 --lr 5e-4 --weight-decay 0.1 --drop-path 0.0 --no_amp "$@"
