#!/usr/bin/env bash
# Builds a release, checks it and trains with it; uploads it only when told to.
#
#   bash tools/release.sh [--out DIR]            build and check; DIR defaults to dist/ in this checkout
#   bash tools/release.sh --upload [REPOSITORY]  then upload with twine; REPOSITORY defaults to pypi
#
# The steps: sdist and wheel from the files that git knows, twine's checks, the wheel in an environment of its own,
# its requirements, and `iconformer train` there, from another folder. The environment takes the libraries from the
# one that runs this, so nothing is downloaded.
#
#   PYTHON   the interpreter with the libraries and the extra `release` (default: .venv here, else python)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python
out=$root/dist repository=

say() { printf '[release] %s\n' "$*"; }
die() { printf '[release] error: %s\n' "$*" >&2; exit 1; }

while [ $# -gt 0 ]; do
    case $1 in
        --out) [ $# -gt 1 ] || die '--out needs a folder'; out=$2; shift 2 ;;
        --upload) repository=${2:-pypi}; shift $(($# > 1 ? 2 : 1)) ;;
        *) die "unknown option '$1'; the first lines of tools/release.sh say what there is" ;;
    esac
done

# What stops a release is said before anything is built.
command -v git >/dev/null && git -C "$root" rev-parse --git-dir >/dev/null 2>&1 ||
    die "$root is no git checkout; a release is made of what git knows"
"$python" -c 'import build, twine, setuptools' 2>/dev/null ||
    die "$python lacks build, twine or setuptools; install them with: pip install -e '.[release]'"
version=$(sed -n "s/^__version__ = '\(.*\)'$/\1/p" "$root/iconformer_mm/version.py")
heading=$(sed -n 's/^## \[\(.*\)\] - \(.*\)$/\1 \2/p' "$root/CHANGELOG.md" | head -n 1)
[ "${heading% *}" = "$version" ] ||
    die "CHANGELOG.md begins with ${heading% *}, iconformer_mm/version.py has $version; make them agree"
if [ -n "$repository" ]; then
    [ -z "$(git -C "$root" status --porcelain)" ] || die 'there are changes that are not committed; commit or stash them'
    [ "${heading#* }" != unreleased ] || die "CHANGELOG.md says that $version is unreleased; write the date there"
    git -C "$root" tag --points-at HEAD | grep -qx "v$version" ||
        die "the commit has no tag v$version; make it with: git tag -a v$version -m 'Release $version'"
fi

scratch=$(mktemp -d "${TMPDIR:-/tmp}/iconformer_mm_release.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1
quietly() {
    local what=$1; shift
    say "$what"
    "$@" >"$scratch/log" 2>&1 || { tail -n 30 "$scratch/log" >&2; die "$what: failed, see the lines above"; }
}

mkdir "$scratch/source" "$scratch/elsewhere"
(cd "$root" && git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [ ! -f "$file" ] || printf '%s\0' "$file"; done |
    tar --create --null --files-from - | tar --extract --directory "$scratch/source")

quietly "building $version" "$python" -m build --no-isolation --outdir "$scratch/dist" "$scratch/source"
wheel=$scratch/dist/iconformer_mm-$version-py3-none-any.whl
[ -f "$wheel" ] || die "the build made $(ls "$scratch/dist"), not $(basename "$wheel")"
quietly "checking the metadata and the description" "$python" -m twine check --strict "$scratch"/dist/*

# No .pth file in a folder that a .pth file names is read, so an editable install there has no effect.
venv=$scratch/venv/bin
quietly "making a fresh environment" "$python" -m venv --without-pip "$scratch/venv"
quietly "installing the wheel" "$python" -m pip --python "$venv/python" install --no-deps "$wheel"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$venv/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/libraries.pth"
quietly "checking its requirements" \
    "$python" -m pip --python "$venv/python" install --dry-run 'iconformer_mm[cls,cpu,report]'

cd "$scratch/elsewhere"
imported=$("$venv/python" -c 'import iconformer_mm; print(iconformer_mm.__version__, iconformer_mm.__file__)')
case $imported in
    "$version $scratch/venv/"*) ;;
    *) die "the environment imports $imported, not $version from the wheel" ;;
esac
quietly "training with it" "$venv/iconformer" train iconformer_mm::quickstart/vit-quickstart_icon_digits.py \
    --work-dir out --cfg-options train_cfg.max_epochs=6 train_cfg.val_interval=6
[ -f out/adapter.safetensors ] || die 'training left no out/adapter.safetensors'
quietly "reading its adapter file" "$venv/iconformer" adapter info out/adapter.safetensors

mkdir -p "$out"
cp "$scratch"/dist/* "$out"
say "$version is in $out:"
(cd "$scratch/dist" && ls)
if [ -n "$repository" ]; then
    say "uploading to $repository"
    "$python" -m twine upload --repository "$repository" "$scratch"/dist/*
fi
