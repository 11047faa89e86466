#!/usr/bin/env bash
# Train UPerNet on Vim-Ti on ADE20K, crops of 512 pixels (1,024 tokens).
#
#   CKPT=vim_t.pth DATA_PATH=/data/ADEChallengeData2016 bash seg/scripts/upernet-vim-t.sh [flags of train.py]
#
# Expected   41.0 % val mIoU (the paper's, 13 M parameters; DeiT-Ti 39.2).
#            No weights or logs are published; not reproduced here.
# Hardware   meant for 8 GPUs; fewer GPUs accumulate gradients. --grad-checkpointing saves memory.
# Hours      paper: 2.6 M crops, 713 / (crops per second of all GPUs); published: 1.9 M, 533 / (crops per second).
# Variables  CKPT DATA_PATH OUTPUT_DIR GPUS BATCH NNODES NODE_RANK MASTER_ADDR MASTER_PORT; see
#            vim/scripts/common.sh. RECIPE: `paper` (default) or `published`.
#
# paper      AdamW at 6e-5, weight decay 0.01, 160,000 steps of 16 (127 epochs of 1,263), linear warm-up of 1,500, then
#            linear decay.
# published  2e-4, weight decay 0.1, 60,000 steps of 32 (95 epochs of 631): what the published scripts came to. Their
#            layer-wise decay of 0.92 matched no block; `--layer-decay 0.92` applies it.
# CKPT is a classifier's checkpoint (ImageNet-1K).

FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
LAUNCHED=$FOLDER/../train.py
DATA_FOLDER="ADE20K's folder: images/ and annotations/, with training/ and validation/ in each"
# shellcheck source=../../vim/scripts/common.sh
source "$FOLDER/../../vim/scripts/common.sh"

require_checkpoint
case ${RECIPE:=paper} in
    paper) whole=16 recipe=(--epochs 127 --lr 6e-5 --weight-decay 0.01) ;;
    published) whole=32 recipe=(--epochs 95 --lr 2e-4 --weight-decay 0.1) ;;
    *) fail "RECIPE='$RECIPE' is not paper or published." ;;
esac
launch "$whole" 4 \
    --data-set ADE20K \
    --model vim_tiny_patch16_224 \
    --finetune "$CKPT" \
    --sched poly --min-lr 0 --warmup-steps 1500 \
    --resize 512x2048 --crop-size 512 --window-stride 341 --dist-eval "${recipe[@]}" "$@"
