# Sourced by the other scripts: a virtual environment in .venv with the project and the extras named in $1 ("" for
# none). What is there already is used again. PYTHON=python3.12 chooses another interpreter (3.10 or newer).
install() {
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    local faiss=cpu stamp
    if nvidia-smi -L >/dev/null 2>&1; then faiss=gpu; fi
    stamp="$(cksum < setup.cfg) $faiss $1"
    if [ "$(cat ".venv/installed${1:+-$1}" 2>/dev/null)" != "$stamp" ]; then
        echo "installing into .venv (faiss-$faiss${1:+, $1}); the first time this takes some minutes" >&2
        .venv/bin/python -m pip install --quiet --editable ".[$faiss${1:+,$1}]"
        echo "$stamp" > ".venv/installed${1:+-$1}"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
