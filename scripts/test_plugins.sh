#!/usr/bin/env bash
# Runs a plug-in inside the tool itself, in an environment of the tool's own (made once, CPU only); "torchvision" is
# .venv with torchvision and PyAV beside it, for families whose processors want them, and for videos.
#   scripts/test_plugins.sh [TOOL] [pytest options]   make it, run the tool's tests
#   scripts/test_plugins.sh [TOOL] --environment      make it, print its python
# TOOL: lmms-eval (default; .venv-plugins), vlmeval (.venv-vlmeval), vllm (.venv-vllm) or torchvision
# (.venv-torchvision). Status 3: a package cannot be had. DYVTE_PLUGINS_PYTHON, DYVTE_VLMEVAL_PYTHON,
# DYVTE_VLLM_PYTHON and DYVTE_TORCHVISION_PYTHON name environments that are there already.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

choose_tool() {
    case "$1" in
    lmms-eval) FOLDER=.venv-plugins LIST=constraints-plugins.txt VARIABLE=DYVTE_PLUGINS_PYTHON TESTS=test_lmms_eval ;;
    vlmeval) FOLDER=.venv-vlmeval LIST=constraints-vlmeval.txt VARIABLE=DYVTE_VLMEVAL_PYTHON TESTS=test_vlmeval ;;
    vllm) FOLDER=.venv-vllm LIST=constraints-vllm.txt VARIABLE=DYVTE_VLLM_PYTHON TESTS=test_vllm ;;
    torchvision)
        FOLDER=.venv-torchvision LIST=constraints-torchvision.txt VARIABLE=DYVTE_TORCHVISION_PYTHON
        TESTS=test_torchvision
        ;;
    *) return 1 ;;
    esac
}

site_of() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

make_tool_environment() {
    TOOL_PYTHON="${!VARIABLE:-$ROOT/$FOLDER/bin/python}"
    if [ -n "${!VARIABLE:-}" ]; then
        return 0
    fi
    local stamp="$ROOT/$FOLDER/.dyvte-installed" wanted
    wanted="$(cat "$ROOT/$LIST" "$ROOT/pyproject.toml" | cksum)"
    if [ -x "$TOOL_PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return 0
    fi
    echo "[plugins] installing $TOOL into $FOLDER (a few minutes, once)" >&2
    [ -x "$TOOL_PYTHON" ] || "$PYTHON" -m venv "$ROOT/$FOLDER" >&2
    local pip=("$TOOL_PYTHON" -m pip install --quiet --disable-pip-version-check)
    if [ "$TOOL" = torchvision ]; then
        # everything of .venv, and beside it what is listed
        make_environment >&2
        site_of "$PYTHON" >"$(site_of "$TOOL_PYTHON")/base.pth"
        if ! "${pip[@]}" --no-deps -r "$ROOT/$LIST" >&2; then
            echo "error: $TOOL cannot be had; a package registry must be reachable by pip (see above)" >&2
            return 3
        fi
    # torch alone and first, as in env.sh; then exactly what is listed, so that nothing changes it
    elif ! "${pip[@]}" -c "$ROOT/$LIST" torch==2.13.0 setuptools >&2 ||
        ! "${pip[@]}" --no-deps -r "$ROOT/$LIST" >&2; then
        echo "error: $TOOL cannot be had; a package registry must be reachable by pip (see above)" >&2
        return 3
    else
        "${pip[@]}" --no-deps --no-build-isolation -e "$ROOT" >&2
    fi
    if grep -q '^torchvision==' "$ROOT/$LIST"; then
        local site
        site="$(site_of "$TOOL_PYTHON")"
        cp "$ROOT/scripts/declare_torchvision.py" "$site/"
        echo "import declare_torchvision" >"$site/declare_torchvision.pth"
    fi
    echo "$wanted" >"$stamp"
}

TOOL=lmms-eval
choose_tool "$TOOL"
if [ $# -gt 0 ] && choose_tool "$1"; then
    TOOL="$1"
    shift
fi
if [ "${1:-}" = "--environment" ]; then
    make_tool_environment || exit $?
    echo "$TOOL_PYTHON"
    exit 0
fi
make_environment
make_tool_environment || exit $?
cd "$ROOT"
env "$VARIABLE=$TOOL_PYTHON" OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" \
    "$PYTHON" -m pytest "tests/plugins/$TESTS.py" "$@"
