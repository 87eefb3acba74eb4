#!/usr/bin/env bash
# Makes the virtual environment that this project is developed and tested in.
#
#   bash tools/setup_env.sh [VENV]                    everything; VENV defaults to .venv in this checkout
#   bash tools/setup_env.sh --classification [VENV]   MMPretrain and timm alone, without compiled operators
#   bash tools/setup_env.sh --original [VENV]         the original releases; VENV defaults to .venv-original
#
# The first two have the maintained builds of the OpenMMLab libraries. The original
# releases end at torch 2.1 and Python 3.11. Running the first after the second adds
# what is missing.
#
# Safe to run again: a complete environment is recognised and left alone, an
# interrupted one is completed. Compiling mmcv's operators takes about 6 minutes on
# 2 cores. It goes on where it was interrupted. The wheel is kept outside the
# checkout, one per version.
#
#   PYTHON                the interpreter to use (default: one that serves on PATH)
#   ICONFORMER_MM_CACHE   where wheels are kept (default: ~/.cache/iconformer_mm)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stack=maintained pythons='3.11 or 3.12' mmcv=onedl-mmcv operators=1 space=9000
venv=$root/.venv
constraints=$root/requirements/constraints.txt
ours=(--editable "$root[cls,det,seg,timm,quickstart,test]")
steps=6
case "${1:-}" in
    --original)
        shift
        stack=original pythons='3.11' mmcv=mmcv
        venv=$root/.venv-original
        constraints=$root/requirements/constraints-original.txt
        ours=(--requirement "$root/requirements/original.txt" --editable "$root[cpu,report,timm]")
        ;;
    --classification)
        shift
        stack=classification operators=0 space=7000
        ours=(--editable "$root[cls,timm,quickstart]")
        ;;
    --*) printf '[setup] error: there is no option %s; there are --classification and --original\n' "$1" >&2; exit 1 ;;
esac
venv=${1:-$venv}
cache=${ICONFORMER_MM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/iconformer_mm}
python=$venv/bin/python

say() { printf '[setup] %s\n' "$*"; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }
pinned() { sed -n "s/^$1==//p" "$constraints"; }

# pip's output goes to a log; only a failure shows its end.
log=$(mktemp "${TMPDIR:-/tmp}/iconformer_mm_setup.XXXXXX")
trap 'rm -f "$log"' EXIT
step=0
quietly() {
    local what=$1 start=$SECONDS; shift
    step=$((step + 1))
    say "$step/$steps $what"
    "$@" >"$log" 2>&1 || { tail -n 30 "$log" >&2; die "$what: failed, see the lines above"; }
    say "$step/$steps done in $((SECONDS - start)) s"
}

need_space() {  # need_space FOLDER MIB WHAT
    local folder=$1 free
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    free=$(df -Pm "$folder" | awk 'NR == 2 {print $4}')
    [ "$free" -ge "$2" ] || die "$3 needs $2 MiB free under $folder, there are $free"
}

supported() {
    "$1" -c 'import sys, venv; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1].split())' "$pythons" 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" || die "PYTHON=$PYTHON is not a working Python $pythons (with the venv module)"
        echo "$PYTHON"; return
    fi
    local name
    for name in python3.11 python3.12 python3 python; do
        if command -v "$name" >/dev/null && supported "$name"; then echo "$name"; return; fi
    done
    die "no Python $pythons (with the venv module) found on PATH; set PYTHON to one"
}

stamp=$venv/.iconformer_mm
fingerprint() { (cd "$root" && cat requirements/*.txt pyproject.toml setup.py tools/setup_env.sh <(pwd; echo "$1") | cksum); }
wanted=$(fingerprint $stack)
made=$(cat "$stamp" 2>/dev/null || true)
if [ "$made" = "$wanted" ] || { [ $stack = classification ] && [ "$made" = "$(fingerprint maintained)" ]; }; then
    say "environment $venv is complete"
    exit 0
fi

if [ ! -x "$python" ] || ! "$python" -m pip --version >/dev/null 2>&1; then
    base=$(find_python)
    need_space "$venv" $space "the environment"
else
    base=$python
    supported "$python" || die "$venv holds $("$python" --version), not Python $pythons; remove it and run again"
fi

# What compiling needs is looked for before anything is installed.
version=$(pinned $mmcv)
tag=$("$base" -c 'import platform, sys; print(sys.implementation.cache_tag, platform.machine(), sep="-")')
name=${mmcv//-/_}-$version-$tag
known=$cache/wheels/$name-torch$(pinned torch)
if [ $operators = 1 ] && ! ls "$known"*/*.whl >/dev/null 2>&1; then
    command -v "${CXX:-c++}" >/dev/null ||
        die "compiling mmcv needs a C++ compiler and there is no '${CXX:-c++}'; install one (Debian: apt-get install g++)"
    need_space "$cache" 1000 "compiling mmcv"
fi

if [ "$base" != "$python" ]; then
    steps=$((steps + 1))
    quietly "creating $venv with $("$base" --version)" "$base" -m venv "$venv"
fi

pip() { "$python" -m pip --disable-pip-version-check "$@"; }
install() { pip install --constraint "$constraints" "$@"; }

# Compiles mmcv in a folder that stays until it is done, so that an interrupted build goes on where it was.
compile_mmcv() {
    local build=$1 sources objects
    mkdir -p "$build"
    if ! ls "$build"/source/setup.py >/dev/null 2>&1; then
        rm -rf "$build/source" "$build/unpacked"
        mkdir "$build/unpacked"
        pip download --no-build-isolation --no-deps --no-binary "$mmcv" --dest "$build" "$mmcv==$version" || return
        tar -xzf "$build"/*.tar.gz -C "$build/unpacked" || return
        mv "$build"/unpacked/* "$build/source"
    fi
    # -g0: without debug information the build takes half the time. Built in
    # isolation it would not see torch, and hold no operators at all.
    CFLAGS=-g0 MMCV_WITH_OPS=1 PATH="$venv/bin:$PATH" \
        pip wheel --no-build-isolation --no-deps --wheel-dir "$build/wheel" "$build/source" &
    while kill -0 $! 2>/dev/null; do
        sources=$(find "$build/source/mmcv/ops/csrc/pytorch" -name '*.cpp' -not -path '*/cuda/*' -not -path '*/npu/*' | wc -l)
        objects=$(find "$build/source/build" -name '*.o' 2>/dev/null | wc -l)
        printf '[setup]   compiled %s of about %s files\n' "$objects" "$sources" >&3
        sleep 15
    done
    wait $!
}

exec 3>&1  # progress is shown, the rest goes to the log
quietly "installing build tools" install -r "$root/requirements/build.txt"
quietly "installing torch $(pinned torch) and torchvision $(pinned torchvision) (1 to 4 minutes)" install torch torchvision numpy

if [ $operators = 1 ]; then
    # The operators are for the torch at hand, and for CUDA where there is a GPU.
    wheels=$cache/wheels/$name-torch$("$python" -c 'import torch
print(torch.__version__, "cuda" if torch.cuda.is_available() else "cpu", sep="-")')
    if ! ls "$wheels"/*.whl >/dev/null 2>&1; then
        build=$cache/build/$(basename "$wheels")
        mkdir -p "$cache/wheels"
        steps=$((steps + 1))
        quietly "compiling mmcv $version with its operators (once; about 6 minutes on 2 cores)" compile_mmcv "$build"
        rm -rf "$wheels" && mv "$build/wheel" "$wheels" && chmod 755 "$wheels" && rm -rf "$build"
    fi
    quietly "installing mmcv $version from $wheels" install --force-reinstall --no-deps "$wheels"/*.whl
else
    # Built in isolation it does not see torch, and then holds no operators. Not by pip's cache, where others
    # would find it in place of one with operators.
    quietly "installing mmcv $version without its operators" install --no-cache-dir --no-deps "$mmcv==$version"
fi
quietly "installing iconformer_mm and the libraries it plugs into (1 to 2 minutes)" \
    install --no-build-isolation "${ours[@]}"
quietly "checking the environment" pip check
if [ $operators = 1 ]; then
    quietly "checking mmcv's operators" "$python" -c 'from mmcv.ops import MultiScaleDeformableAttention'
else
    quietly "checking the libraries" "$python" -c 'import mmpretrain, iconformer_mm'
fi

echo "$wanted" >"$stamp"
say "environment $venv is ready: . $venv/bin/activate"
