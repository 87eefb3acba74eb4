#!/usr/bin/env bash
# Makes the virtual environment that this project is developed and tested in.
#
#   bash tools/setup_env.sh [VENV]              VENV defaults to .venv in this checkout
#   bash tools/setup_env.sh --original [VENV]   VENV defaults to .venv-original
#
# The first has the maintained builds of the OpenMMLab libraries, the second the
# original releases, which end at torch 2.1 and Python 3.11.
#
# Safe to run again: a complete environment is recognised and left alone, an
# interrupted one is completed. The compiled mmcv wheel (the one slow step,
# about 6 minutes on 2 cores) is kept outside the checkout, one per version.
#
#   PYTHON                the interpreter to use (default: one that serves on PATH)
#   ICONFORMER_MM_CACHE   where wheels are kept (default: ~/.cache/iconformer_mm)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ "${1:-}" = --original ]; then
    shift
    stack=original pythons='3.11' mmcv=mmcv
    venv=${1:-$root/.venv-original}
    constraints=$root/requirements/constraints-original.txt
    ours=(--requirement "$root/requirements/original.txt" --editable "$root[cpu,report,timm]")
else
    stack=maintained pythons='3.11 or 3.12' mmcv=onedl-mmcv
    venv=${1:-$root/.venv}
    constraints=$root/requirements/constraints.txt
    ours=(--editable "$root[cls,det,seg,timm,quickstart,test]")
fi
cache=${ICONFORMER_MM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/iconformer_mm}
python=$venv/bin/python

say() { printf '[setup] %s\n' "$*"; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }
pinned() { sed -n "s/^$1==//p" "$constraints"; }

# pip's output goes to a log; only a failure shows its end.
log=$(mktemp "${TMPDIR:-/tmp}/iconformer_mm_setup.XXXXXX")
scratch=
trap 'rm -rf "$log" ${scratch:+"$scratch"}' EXIT
quietly() {
    local what=$1; shift
    say "$what"
    "$@" >"$log" 2>&1 || { tail -n 30 "$log" >&2; die "$what: failed, see the lines above"; }
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
wanted=$(cd "$root" && cat requirements/*.txt pyproject.toml setup.py tools/setup_env.sh <(pwd; echo $stack) | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    say "environment $venv is complete"
    exit 0
fi

if [ ! -x "$python" ] || ! "$python" -m pip --version >/dev/null 2>&1; then
    base=$(find_python)
    need_space "$venv" 9000 "the environment"
else
    base=$python
    supported "$python" || die "$venv holds $("$python" --version), not Python $pythons; remove it and run again"
fi

# What compiling needs is looked for before anything is installed.
version=$(pinned $mmcv)
tag=$("$base" -c 'import platform, sys; print(sys.implementation.cache_tag, platform.machine(), sep="-")')
name=${mmcv//-/_}-$version-$tag
known=$cache/wheels/$name-torch$(pinned torch)
if ! ls "$known"*/*.whl >/dev/null 2>&1; then
    command -v "${CXX:-c++}" >/dev/null ||
        die "compiling mmcv needs a C++ compiler and there is no '${CXX:-c++}'; install one (Debian: apt-get install g++)"
    need_space "$cache" 1000 "compiling mmcv"
fi

if [ "$base" != "$python" ]; then
    quietly "creating $venv with $("$base" --version)" "$base" -m venv "$venv"
fi

pip() { "$python" -m pip --disable-pip-version-check "$@"; }
install() { pip install --constraint "$constraints" "$@"; }

quietly "installing build tools" install -r "$root/requirements/build.txt"
quietly "installing torch $(pinned torch) and torchvision $(pinned torchvision)" install torch torchvision numpy

# The operators are for the torch at hand, and for CUDA where there is a GPU.
wheels=$cache/wheels/$name-torch$("$python" -c 'import torch
print(torch.__version__, "cuda" if torch.cuda.is_available() else "cpu", sep="-")')
if ! ls "$wheels"/*.whl >/dev/null 2>&1; then
    mkdir -p "$cache/wheels"
    scratch=$(mktemp -d "$cache/wheels/.build.XXXXXX")
    # -g0: without debug information the build takes half the time. Built in
    # isolation it would not see torch, and hold no operators at all.
    CFLAGS=-g0 MMCV_WITH_OPS=1 PATH="$venv/bin:$PATH" \
        quietly "compiling mmcv $version with its operators (once; about 6 minutes on 2 cores)" \
        pip wheel --no-build-isolation --no-deps --wheel-dir "$scratch" "$mmcv==$version"
    rm -rf "$wheels" && mv "$scratch" "$wheels" && chmod 755 "$wheels"
fi
quietly "installing mmcv $version from $wheels" install "$wheels"/*.whl
quietly "installing iconformer_mm and the libraries it plugs into" \
    install --no-build-isolation "${ours[@]}"
quietly "checking the environment" pip check
quietly "checking mmcv's operators" "$python" -c 'from mmcv.ops import MultiScaleDeformableAttention'

echo "$wanted" >"$stamp"
say "environment $venv is ready"
