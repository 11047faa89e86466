#!/usr/bin/env bash
# Builds the CPU kernels of a package with AddressSanitizer and UndefinedBehaviorSanitizer beside a copy of its Python
# files, and runs its kernel tests on that copy.
#   mamba-1p1p1/csrc/sanitize.sh [package folder, default this one] [pytest arguments]
set -euo pipefail
package=$(realpath "${1:-$(dirname "$0")/..}")
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cd "$package"
export CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
export CXXFLAGS=$CFLAGS # which of the two compiles C++ depends on setuptools' age
export LDFLAGS="-fsanitize=address,undefined"
python setup.py -q build --build-base "$copy/build" --build-lib "$copy/lib"
# From the copy's folder: in the package's own, Python would import the kernels that are installed there.
cd "$copy"
export PYTHONPATH="$copy/lib"
module=$(cd lib && find . -name cpu.py | sed 's|^\./||; s|\.py$||; s|/|.|g')
library=$(python -c "import $module as cpu; print(cpu._library_path())")
if [[ $library != "$copy"/lib/* ]] || ! grep -q __asan_report "$library" || ! grep -q __ubsan_handle "$library"; then
    echo "$library is not the sanitized library" >&2
    exit 1
fi
# OpenMP's own threads are never joined and CPython frees nothing at exit: leaks are not looked for.
# A report ends the process, so pytest must not be holding back what goes to stderr's descriptor.
LD_PRELOAD=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so) \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY=passive \
    python -m pytest -q -p no:cacheprovider --capture=sys "$package"/tests/test_cpu*.py "${@:2}"
