# Sourced by the other scripts: sets PYTHON to an interpreter that has the packages of the files in
# REQUIREMENTS (default: requirements.txt). Without a PYTHON of the user's own, that is .venv, made
# and filled when it is missing or the files have changed. Nothing else on the machine is touched.
case ${PYTHON:-} in
    */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; # good after the cd, too
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PROJECT=$PWD
if [ -z "${OMP_WAIT_POLICY:-}" ]; then # see utils/processes/threads.py
    export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
fi

if [ -z "${PYTHON:-}" ]; then
    requirements=${REQUIREMENTS:-requirements.txt}
    base=$(command -v python3 || command -v python) || {
        echo "error: there is no python3 on the PATH; install Python 3.10 or newer." >&2
        exit 2
    }
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $base is older than Python 3.10; put a newer python3 on the PATH." >&2
        exit 2
    }
    PYTHON=$PROJECT/.venv/bin/python
    if ! "$PYTHON" -c '' 2>/dev/null; then
        echo "making a virtual environment in .venv"
        rm -rf .venv
        # Some distributions ship venv without ensurepip; pip then installs from outside.
        "$base" -m venv .venv >/dev/null 2>&1 || "$base" -m venv --clear --without-pip .venv
    fi
    pip=("$PYTHON" -m pip)
    "${pip[@]}" --version >/dev/null 2>&1 || pip=("$base" -m pip --python "$PYTHON")
    for file in $requirements; do
        stamp=.venv/installed-$(echo "$file" | tr / -)
        if ! cmp -s "$file" "$stamp"; then
            echo "installing $file (torch is large: some minutes at the first time)"
            "${pip[@]}" install --quiet --disable-pip-version-check -r "$file"
            cp "$file" "$stamp"
        fi
    done
fi
export PYTHON
