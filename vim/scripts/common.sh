# shellcheck shell=bash
# What the pt-*.sh and ft-*.sh scripts share. They set the recipe, source this file and call `launch`. Scripts of
# other programs first set LAUNCHED, the file to run, and DATA_FOLDER, what DATA_PATH is to be.
#
# From the environment:
#   DATA_PATH    image folder with train/ and val/, one sub-folder per class (required)
#   OUTPUT_DIR   where the run is written (default: output/<script name> in the repository)
#   GPUS         GPUs of this machine to use (default: all that nvidia-smi lists)
#   BATCH        images per GPU and pass (default: the published number, less on more than 8 GPUs)
#   CKPT         ft-*.sh: the stride-16 weights to start from: a path, https://... or hf-hub:... (required)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   several machines: run the script on each, with its NODE_RANK
#   PYTHON       the interpreter (default: the repository's .venv if there is one, else python)
#   DRY_RUN=1    print the command instead of running it
# Flags of the script are passed on to main.py and win over the recipe's.
#
# A run that was stopped goes on (--resume auto), so start the same script again. SIGUSR1, SIGTERM or SIGINT to
# this process make it save first and exit with 75; a rank that dies restarts all of them, three times at most.
#
# The whole batch stays the published one on any number of GPUs: fewer GPUs accumulate gradients over more
# passes (--accum-steps). The learning rate follows the whole batch, so it does not change either.

set -euo pipefail

SCRIPT_NAME=$(basename "$0" .sh)
VIM_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REPO_DIR=$(dirname "$VIM_DIR")

# Exit code 4 is the program's own for bad data or configuration.
fail() {
    printf '%s: %s\n' "$SCRIPT_NAME.sh" "$1" >&2
    exit 4
}

# require_count NAME VALUE MINIMUM: the variable is a whole number of at least MINIMUM.
require_count() {
    local error="$1='$2' must be a whole number of at least $3."
    [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "$error"
    (($2 >= $3)) || fail "$error"
}

# gpus_of_this_machine: how many nvidia-smi lists; 0 without it, and where it fails.
gpus_of_this_machine() {
    local count=0 line
    while read -r line; do
        if [[ $line == "GPU "* ]]; then count=$((count + 1)); fi
    done < <(nvidia-smi --list-gpus 2> /dev/null)
    echo "$count"
}

read_machine() {
    GPUS=${GPUS:-$(gpus_of_this_machine)}
    NNODES=${NNODES:-1}
    NODE_RANK=${NODE_RANK:-0}
    MASTER_PORT=${MASTER_PORT:-29500}
    [[ $GPUS != 0 ]] || fail "no GPU found by nvidia-smi; say how many processes to start, e.g. GPUS=1."
    require_count GPUS "$GPUS" 1
    require_count NNODES "$NNODES" 1
    require_count NODE_RANK "$NODE_RANK" 0
    require_count MASTER_PORT "$MASTER_PORT" 1
    ((NODE_RANK < NNODES)) || fail "NODE_RANK=$NODE_RANK must be below NNODES=$NNODES (ranks start at 0)."
    if ((NNODES > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then
        fail "NNODES=$NNODES needs MASTER_ADDR, the address of the machine with NODE_RANK=0."
    fi
}

read_paths() {
    [[ -n ${DATA_PATH:-} ]] || fail "set DATA_PATH to ${DATA_FOLDER:-the image folder that has train/ and val/}."
    [[ -d $DATA_PATH ]] || fail "DATA_PATH='$DATA_PATH' is not a folder."
    OUTPUT_DIR=${OUTPUT_DIR:-$REPO_DIR/output/$SCRIPT_NAME}
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python
        [[ ! -x $REPO_DIR/.venv/bin/python ]] || PYTHON=$REPO_DIR/.venv/bin/python
    fi
    command -v "$PYTHON" > /dev/null ||
        fail "PYTHON='$PYTHON' is not an interpreter; run 'make install' or set PYTHON."
}

# require_checkpoint: CKPT is set, and is a file unless it is an address.
require_checkpoint() {
    [[ -n ${CKPT:-} ]] || fail "set CKPT to the stride-16 weights (a path, https://... or hf-hub:...)."
    [[ $CKPT == https://* || $CKPT == hf-hub:* || -f $CKPT ]] ||
        fail "CKPT='$CKPT' is not a file; a path, https://... or hf-hub:... is expected."
}

# split_batch WHOLE PER_GPU: sets BATCH and ACCUM_STEPS so that ranks x BATCH x ACCUM_STEPS = WHOLE.
split_batch() {
    local whole=$1 per_gpu=$2 ranks=$((GPUS * NNODES))
    if [[ -z ${BATCH:-} ]]; then
        BATCH=$((whole / ranks < per_gpu ? whole / ranks : per_gpu))
    fi
    require_count BATCH "$BATCH" 1
    ACCUM_STEPS=$((whole / (ranks * BATCH)))
    ((ACCUM_STEPS * ranks * BATCH == whole)) ||
        fail "$ranks GPUs x BATCH=$BATCH do not divide the recipe's whole batch of $whole; choose other GPUS or BATCH."
}

# launch WHOLE_BATCH BATCH_PER_GPU FLAG...: runs LAUNCHED, by default main.py, under torchrun, through launch.py.
launch() {
    local whole=$1 per_gpu=$2
    shift 2
    read_machine
    read_paths
    split_batch "$whole" "$per_gpu"
    local rendezvous=(--standalone)
    if ((NNODES > 1)); then
        rendezvous=(--nnodes "$NNODES" --node_rank "$NODE_RANK"
            --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
    fi
    local command=("$PYTHON" "$VIM_DIR/launch.py" "${rendezvous[@]}" --nproc_per_node "$GPUS"
        "${LAUNCHED:-$VIM_DIR/main.py}" --data-path "$DATA_PATH" --output_dir "$OUTPUT_DIR" --resume auto
        --batch-size "$BATCH" --accum-steps "$ACCUM_STEPS" "$@")
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "${command[@]}"
        echo
    else
        exec "${command[@]}"
    fi
}
