#!/usr/bin/env bash
# Make .venv from the lock file and install posttrain into it. Running it again costs a second: a stamp
# holds the hash of what was installed, and only a changed lock or pyproject installs again.
# PYTHON=python3.12 environment/setup.sh chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '[setup] %s\n' "$*"; }
fail() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        # a pyenv shim exists without its version: run it instead of looking for it
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 found; install one (Debian: apt-get install python3.11 python3.11-venv)" \
         "or name it: PYTHON=/path/to/python environment/setup.sh"
}

system_packages() {
    # bubblewrap and setpriv (util-linux) hold the sandbox of the code rewards, g++ (with gcc) compiles C
    # answers and the experts on a CPU
    local missing=()
    command -v bwrap >/dev/null || missing+=(bubblewrap)
    command -v setpriv >/dev/null || missing+=(util-linux)
    command -v gcc >/dev/null && command -v g++ >/dev/null || missing+=(g++ libc6-dev)
    [ "$(uname -s)" = Linux ] || { say "not Linux: no sandbox here, code rewards will not run"; return; }
    if [ ${#missing[@]} -gt 0 ]; then
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            say "installing system packages: ${missing[*]}"
            apt-get update -qq
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
        else
            say "missing system packages: ${missing[*]}. Code rewards need them; install with:"
            say "    sudo apt-get install ${missing[*]}"
        fi
    fi
}

make_venv() {
    [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 && return
    local python
    python=$(find_python) || exit 1
    say "making .venv with $("$python" --version) ($python)"
    rm -rf .venv
    if ! "$python" -m venv .venv; then
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            say "this Python has no venv module: installing python3-venv"
            apt-get update -qq
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null
            rm -rf .venv
            "$python" -m venv .venv || fail "$python cannot make a virtual environment; choose another with PYTHON="
        else
            fail "$python has no venv module; install it with: sudo apt-get install python3-venv"
        fi
    fi
}

system_packages
make_venv

lock=${LOCK:-requirements-cpu.lock}
[ -f "$lock" ] || fail "$lock: no such lock file"
# the folder is part of it: an editable install names where the checkout lies
want=$({ pwd; .venv/bin/python --version; cat "$lock" pyproject.toml; } | sha256sum | cut -d' ' -f1)
stamp=.venv/installed.sha256
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    say ".venv is up to date"
    exit 0
fi

say "installing $(grep -vc '^#' "$lock") pinned packages from $lock (about 3 minutes, 4 GB on disk)"
rm -f "$stamp"
.venv/bin/python -m pip install --disable-pip-version-check --no-input --no-deps --prefer-binary -r "$lock" \
    || fail "pip could not install $lock; the line above says which package. Mend it and run the same command again"
.venv/bin/python -m pip install --disable-pip-version-check --no-input --no-deps --no-build-isolation --quiet -e . \
    || fail "pip could not install posttrain itself from $PWD"

if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    # the lock leaves out the CUDA libraries, without which the CUDA build does not load even on a CPU
    torch=$(grep '^torch==' "$lock")
    say "torch does not load, as its CUDA build without its libraries: installing what it requires (about 3 GB)"
    .venv/bin/python -m pip install --disable-pip-version-check --no-input --prefer-binary --quiet "$torch" \
        || fail "pip could not install what $torch needs; the line above says which package"
fi
build=$(.venv/bin/python -c 'import torch; print(torch.__version__, "CUDA " + torch.version.cuda if torch.version.cuda else "CPU")')
say "torch $build"
[[ $build != *CUDA* ]] || say "the CUDA build runs on a CPU too; to use a GPU install the 'gpu' extra instead"
echo "$want" > "$stamp"
say "done: .venv/bin/posttrain --help"
