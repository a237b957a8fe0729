# Sourced by the other scripts: makes or reuses .venv with pinned CPU dependencies, sets $PYTHON.
# Works from any current folder and with no network beyond the package registry.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

make_environment() {
    local base stamp wanted
    for base in "${DYVTE_PYTHON:-}" python3 python; do
        [ -n "$base" ] && command -v "$base" >/dev/null 2>&1 && break
        base=""
    done
    if [ -z "$base" ] || ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: Python >= 3.10 is needed; install it or name one with DYVTE_PYTHON=/path/to/python" >&2
        return 2
    fi
    if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "error: $base lacks the venv module (on Debian: apt-get install python3-venv)" >&2
        return 2
    fi
    stamp="$ROOT/.venv/.dyvte-installed"
    wanted="$(cat "$ROOT/constraints-cpu.txt" "$ROOT/pyproject.toml" | cksum)"
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return 0
    fi
    echo "[env] installing pinned dependencies into .venv (about two minutes, once)"
    [ -x "$PYTHON" ] || "$base" -m venv "$ROOT/.venv" || return 2
    # torch first and alone: its CPU wheel is then kept by everything that asks for a range of versions
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -c "$ROOT/constraints-cpu.txt" torch==2.13.0 &&
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -c "$ROOT/constraints-cpu.txt" -e "$ROOT[dev]" || {
        echo "error: the installation failed; a package registry must be reachable by pip (see above)" >&2
        return 2
    }
    echo "$wanted" >"$stamp"
}
