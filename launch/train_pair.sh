# Sourced: train_pair CONFIG ATTACK DATA PRESET SEED OUT
# Builds demo data (shapes or emoji), poisons it, trains plain CLIP and SafeCLIP by PRESET on the same poison, compares them.
train_pair() {
    local config=$1 attack=$2 data=$3 preset=$4 seed=$5 out=$6
    local processes=2
    if nvidia-smi -L >/dev/null 2>&1; then
        processes=$(nvidia-smi -L | wc -l)
        [ "$processes" -le 2 ] || processes=2
    fi
    # One thread a process: on few cores more of them only get in each other's way.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + processes - 1) / processes ))}
    safeclip data "$data" "data/$data"
    safeclip attack "$attack" seed="$seed" out="data/${data}_attack_seed$seed"
    local common=(run.seed="$seed" data.overlay="data/${data}_attack_seed$seed")
    for run in clip "$preset"; do
        if [ ! -e "$out/$run/eval.json" ]; then
            echo "== $data, seed $seed: training $run" >&2
            torchrun --standalone --nproc-per-node "$processes" -m pipeline.cli \
                train "$config" preset="$run" run.dir="$out/$run" "${common[@]}"
            safeclip evaluate "$out/$run" --baseline "$out/clip"
        fi
    done
    safeclip compare "$out/clip" "$out/$preset" --out "$out"
}
