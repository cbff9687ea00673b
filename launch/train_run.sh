# Sourced by quickstart.sh and audit.sh. What is finished is used again.

# prepare DATA SEED: build the demo data (shapes, shapes_small or emoji; shapes_small_NAME is another attack on
# shapes_small) and the attack manifest of SEED.
prepare() {
    case "$1" in
        shapes_small*) safeclip data shapes data/shapes_small --pairs 4500 ;;
        *) safeclip data "$1" "data/$1" ;;
    esac
    safeclip attack "configs/attack_$1.yaml" seed="$2" out="data/$1_attack_seed$2"
}

# train_run CONFIG DATA PRESET SEED OUT PROCESSES: train one preset on the poisoned data into OUT/PRESET.
train_run() {
    local config=$1 data=$2 preset=$3 seed=$4 out=$5 processes=$6
    [ ! -e "$out/$preset/eval.json" ] || return 0
    echo "== $data, seed $seed: training $preset" >&2
    # One thread a process, and reading processes of their own only where there are cores left for them.
    local cores=$(( $(nproc) / ${JOBS:-1} / processes ))
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} torchrun --standalone --nproc-per-node "$processes" -m pipeline.cli \
        train "$config" preset="$preset" run.dir="$out/$preset" run.seed="$seed" \
        data.overlay="data/${data}_attack_seed$seed" data.workers=$(( cores > 1 ? 1 : 0 ))
}

# evaluate_run PRESET OUT: write OUT/PRESET/eval.json. The run of plain CLIP beside it tells whether the attacks took.
evaluate_run() {
    local preset=$1 out=$2
    [ -e "$out/$preset/eval.json" ] || safeclip evaluate "$out/$preset" --baseline "$out/clip"
}
