#!/usr/bin/env bash
# Builds the published CUDA kernels, a peer of `make bench-gpu`, for sm_90 only, into output/published.
#
#   PYTHON             the interpreter of the environment that will use them (default: python3)
#   PUBLISHED_SOURCES  a folder with the two source packages, for machines without a network; `pip download
#                      --no-deps --no-build-isolation --no-binary :all: mamba-ssm causal-conv1d` fills it
#   PUBLISHED_PREBUILT a folder with the result of an earlier build for the same torch, used as it is
#   MAX_JOBS           compilers at a time (default: all cores)
#
# Needs the CUDA toolkit's nvcc. The packages go into a folder of their own because one of them has the import
# name of this repository's. What cannot be built is left out of the tables by name.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${PUBLISHED_PREBUILT:-$root/output/published}
python=${PYTHON:-python3}

if compgen -G "$target/selective_scan_cuda*.so" >/dev/null && compgen -G "$target/causal_conv1d_cuda*.so" >/dev/null; then
    echo "The published kernels are built: $target"
    exit 0
fi
if [[ -n ${PUBLISHED_PREBUILT:-} ]]; then
    echo "The published kernels are left out: PUBLISHED_PREBUILT=$target lacks one of the two extensions." >&2
    exit 1
fi
nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc
if ! command -v "$nvcc" >/dev/null; then
    echo "The published kernels are left out: no $nvcc (install the CUDA toolkit, or set CUDA_HOME)." >&2
    exit 1
fi

options=(--no-deps --no-build-isolation --no-binary ":all:" --disable-pip-version-check --target "$target")
if [[ -n ${PUBLISHED_SOURCES:-} ]]; then
    options+=(--no-index --find-links "$PUBLISHED_SOURCES")
fi
# The packages name nine architectures themselves, whatever TORCH_CUDA_ARCH_LIST says. They get a toolkit whose nvcc
# drops the others: a tenth of the work.
toolkit=$(mktemp -d)
trap 'rm -rf "$toolkit"' EXIT
real=$(dirname "$(dirname "$(readlink -f "$(command -v "$nvcc")")")")
ln -s "$real"/* "$toolkit"
rm "$toolkit/bin"
mkdir "$toolkit/bin"
ln -s "$real"/bin/* "$toolkit/bin"
rm "$toolkit/bin/nvcc"
cat >"$toolkit/bin/nvcc" <<EOF
#!/usr/bin/env bash
kept=()
while ((\$#)); do
    case \$1 in
        -gencode) [[ \$2 == *sm_90 ]] && kept+=("\$1" "\$2"); shift 2 ;;
        -gencode=*) [[ \$1 == *sm_90 ]] && kept+=("\$1"); shift ;;
        *) kept+=("\$1"); shift ;;
    esac
done
exec "$real/bin/nvcc" "\${kept[@]}"
EOF
chmod +x "$toolkit/bin/nvcc"
export CUDA_HOME=$toolkit
export MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
export TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=${MAX_JOBS:-$(nproc)}
mkdir -p "$target"
"$python" -m pip install "${options[@]}" causal-conv1d mamba-ssm
