#!/usr/bin/env bash
# `make test-slurm`: the real SLURM stops a job at its time limit and requeues it; the run must not notice.
#
# On Debian or Ubuntu, as root: installs slurmctld, slurmd, slurm-client and munge, starts a one-node cluster with
# accounting off in a temporary folder, and submits a run that is longer than the job's time limit of one minute:
# by vim/scripts/train.sbatch, and by vim/run_with_submitit.py, for which it fetches submitit. Then each run's tensors,
# counters and log rows must equal those of the same run without SLURM. Takes ten to twenty minutes on two cores. The
# daemons and the folder are removed at the end. PYTHON names the interpreter, EPOCHS the length of the run, WAYS what
# submits it ("batch submitit").
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd "$HERE/../.." && pwd)
PYTHON=${PYTHON:-$REPO/.venv/bin/python}
WORK=$(mktemp -d)
PIDS=()

say() { printf 'test-slurm: %s\n' "$1"; }

stop_cluster() {
    local pid
    scancel --user=root 2> /dev/null && wait_for 90 no_job_left || true
    for pid in "${PIDS[@]}"; do
        kill "$pid" 2> /dev/null || true
        tail --pid="$pid" --sleep-interval=0.2 -f /dev/null
    done
    [[ -n ${KEEP:-} ]] || rm -rf "$WORK"
}
trap stop_cluster EXIT

install_slurm() {
    if command -v slurmctld slurmd munged sbatch > /dev/null; then
        return
    fi
    say "installing Debian's slurm"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge > "$WORK/apt.log"
}

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    local seconds=$1
    shift
    until "$@" > /dev/null 2>&1; do
        ((seconds-- > 0)) || { say "waited in vain for: $*"; return 1; }
        sleep 1
    done
}

no_job_left() { [[ -z $(squeue --noheader --states=RUNNING,COMPLETING) ]]; }

start_cluster() {
    local host cpus memory
    host=$(hostname -s)
    cpus=$(nproc --all)
    memory=$(awk '/MemTotal/ { print int($2 / 1024 * 0.8) }' /proc/meminfo)
    mkdir -p "$WORK"/{state,spool,munge}
    chmod 755 "$WORK"
    dd if=/dev/urandom of="$WORK/munge/key" bs=1024 count=1 status=none
    chmod 700 "$WORK/munge"
    chmod 600 "$WORK/munge/key"
    sed -e "s|@WORK@|$WORK|g; s|@HOST@|$host|g; s|@CPUS@|$cpus|g; s|@MEMORY@|$memory|g" \
        "$HERE/slurm.conf" > "$WORK/slurm.conf"
    touch "$WORK"/gpu{0,1} # run_with_submitit.py asks for one a rank
    echo "Name=gpu File=$WORK/gpu[0-1]" > "$WORK/gres.conf"
    export SLURM_CONF=$WORK/slurm.conf
    munged --foreground --key-file="$WORK/munge/key" --socket="$WORK/munge/socket" --force \
        --pid-file="$WORK/munge/pid" --log-file="$WORK/munge/log" --seed-file="$WORK/munge/seed" 2> /dev/null &
    PIDS=("$!" "${PIDS[@]}")
    wait_for 10 test -S "$WORK/munge/socket"
    slurmctld -D > "$WORK/slurmctld.out" 2>&1 &
    PIDS=("$!" "${PIDS[@]}")
    slurmd -D -N "$host" > "$WORK/slurmd.out" 2>&1 &
    PIDS=("$!" "${PIDS[@]}")
    wait_for 30 sh -c "sinfo --noheader --format=%T | grep -q idle" || {
        tail -n 20 "$WORK"/slurm*.out
        return 1
    }
    say "$(sinfo --version) with $cpus CPUs on one node, accounting off"
}

# What both runs are: two ranks, too long for one minute. The recipe's flags come before these.
export DATA_PATH=$WORK GPUS=2 BATCH=64 OMP_NUM_THREADS=1 PYTHON
FLAGS=(--data-set DIGITS --device cpu --model vim_nano_patch4_32 --input-size 16 --num_workers 1
    --warmup-epochs 0 --cooldown-epochs 0 --epochs "${EPOCHS:-60}" --accum-steps 1 --log-every 100)

# hurry JOB: SLURM would let a requeued job wait for two minutes; within a second of its end it cannot start again.
hurry() {
    sleep 5
    scontrol update "JobId=$1" StartTime=now 2> /dev/null || true # it may have started by itself
}

# see_through JOB LOG: until the job is done, however often it is stopped and queued again; then what LOG says of that.
see_through() {
    local job=$1 log=$2 waited=0 state=PENDING
    say "submitted job $job with a time limit of one minute, a signal at least 10 seconds before it"
    until [[ $state == COMPLETED ]]; do
        state=$(squeue --noheader --states=all --jobs="$job" --format=%T)
        [[ $state != PENDING ]] || hurry "$job"
        if [[ $state =~ FAIL|CANCELLED|TIMEOUT ]] || ((waited++ > 1800)); then
            scontrol show job "$job"
            return 1
        fi
        sleep 1
    done
    say "$(scontrol show job "$job" | grep -o 'JobState=[A-Z]*\|Restarts=[0-9]*' | xargs)"
    if scontrol show job "$job" | grep -q Restarts=0; then
        say "the run fitted into the time limit; take more EPOCHS"
        return 1
    fi
    grep -h 'stopped by\|resuming\|queueing\|on the way' "$log" | sed "s|$WORK/||g"
}

# vim/scripts/train.sbatch.
run_batch() {
    export OUTPUT_DIR=$WORK/batch
    local job
    job=$(sbatch --parsable --time=1 --signal=USR1@10 --output="$WORK/batch.out" \
        vim/scripts/train.sbatch vim/scripts/pt-vim-t.sh "${FLAGS[@]}")
    see_through "$job" "$WORK/batch.out" || { tail -n 30 "$WORK/batch.out"; return 1; }
}

# vim/run_with_submitit.py, with the flags that the recipe gives to main.py.
run_submitit() {
    export OUTPUT_DIR=$WORK/submitit
    local command job log
    "$PYTHON" -m pip install --disable-pip-version-check --quiet --target "$WORK/packages" submitit
    eval "command=($(DRY_RUN=1 bash vim/scripts/pt-vim-t.sh "${FLAGS[@]}"))"
    while [[ ${command[0]} != */main.py ]]; do
        command=("${command[@]:1}")
    done
    job=$(PYTHONPATH=$WORK/packages "$PYTHON" vim/run_with_submitit.py --ngpus 2 --cpus-per-gpu 1 --timeout 1 \
        --save-seconds 10 -- "${command[@]:1}" | sed -n 's/^submitted job \([0-9]*\);.*/\1/p')
    log=$OUTPUT_DIR/slurm/${job}_0_log.out
    see_through "$job" "$log" || { tail -n 30 "${log%.out}".*; return 1; }
}

run_without_slurm() {
    say "the same run without SLURM"
    OUTPUT_DIR=$WORK/plain bash vim/scripts/pt-vim-t.sh "${FLAGS[@]}" > "$WORK/plain.out" 2>&1
}

cd "$REPO"
install_slurm
start_cluster
for way in ${WAYS:=batch submitit}; do
    say "the run in SLURM: $way"
    "run_$way"
done
run_without_slurm || { tail -n 30 "$WORK/plain.out"; exit 1; }
for way in $WAYS; do
    "$PYTHON" "$HERE/compare.py" "$WORK/$way" "$WORK/plain"
done
