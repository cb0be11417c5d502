#!/bin/sh
# What the build needs, each missing thing in one line with its remedy. PYTHON: the interpreter to use.
fail() {
    echo "gcu-compile: $1" >&2
    exit 1
}
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null 2>&1 ||
    fail "$python not found. Install Python 3.11, or name yours: make PYTHON=/path/to/python3.11"
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    fail "$python is $("$python" -V 2>&1), but the lock file is for Python 3.11. Name one: make PYTHON=python3.11"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python has no venv module. On Debian: apt-get install python3.11-venv"
command -v g++ >/dev/null 2>&1 ||
    fail "g++ not found; the compiler and its kernels need it. On Debian: apt-get install g++"
command -v git >/dev/null 2>&1 || fail "git not found. On Debian: apt-get install git"
