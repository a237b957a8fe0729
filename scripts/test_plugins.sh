#!/usr/bin/env bash
# Runs the plug-ins inside lmms-eval itself, in an environment of its own (.venv-plugins, made once, CPU only).
#   scripts/test_plugins.sh [pytest options]   make it, run tests/commands/test_plugins.py
#   scripts/test_plugins.sh --environment      make it, print its python
# Status 3: a package cannot be had. DYVTE_PLUGINS_PYTHON names an environment that is there already.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

make_plugins_environment() {
    PLUGINS_PYTHON="${DYVTE_PLUGINS_PYTHON:-$ROOT/.venv-plugins/bin/python}"
    if [ -n "${DYVTE_PLUGINS_PYTHON:-}" ]; then
        return 0
    fi
    local stamp="$ROOT/.venv-plugins/.dyvte-installed" wanted
    wanted="$(cat "$ROOT/constraints-plugins.txt" "$ROOT/pyproject.toml" | cksum)"
    if [ -x "$PLUGINS_PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return 0
    fi
    echo "[plugins] installing lmms-eval into .venv-plugins (a few minutes, once)" >&2
    [ -x "$PLUGINS_PYTHON" ] || "$PYTHON" -m venv "$ROOT/.venv-plugins" >&2
    local pip=("$PLUGINS_PYTHON" -m pip install --quiet --disable-pip-version-check)
    # torch alone and first, as in env.sh; then exactly what is listed, so that nothing changes it
    if ! "${pip[@]}" -c "$ROOT/constraints-plugins.txt" torch==2.13.0 setuptools >&2 ||
        ! "${pip[@]}" --no-deps -r "$ROOT/constraints-plugins.txt" >&2; then
        echo "error: lmms-eval cannot be had; a package registry must be reachable by pip (see above)" >&2
        return 3
    fi
    "${pip[@]}" --no-deps --no-build-isolation -e "$ROOT" >&2
    echo "$wanted" >"$stamp"
}

if [ "${1:-}" = "--environment" ]; then
    make_plugins_environment || exit $?
    echo "$PLUGINS_PYTHON"
    exit 0
fi
make_environment
make_plugins_environment || exit $?
cd "$ROOT"
DYVTE_PLUGINS_PYTHON="$PLUGINS_PYTHON" OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" \
    "$PYTHON" -m pytest tests/commands/test_plugins.py "$@"
