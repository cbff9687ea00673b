# Sourced by the other scripts. gpus: print the number of GPUs that processes started here can see, 0 without any.
gpus() {
    local here visible
    here=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        visible=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c '[^ ]' || true)
        here=$(( visible < here ? visible : here ))
    fi
    echo "$here"
}
