#!/usr/bin/env bash
# Every wheel that permed-compute needs, in one folder with digests: wheelhouse.sh FOLDER [EXTRAS] [ARCH]
# Run from the checkout, with a way out; pip's own configuration says where packages come from.
# ARCH: x86_64 or aarch64, of the machines that will use it; default this one's.
set -o errexit -o nounset -o pipefail

folder=${1:?a folder for the wheels}
extras=${2:-radiology,ray,tracking}
arch=${3:-$(uname -m)}
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-$($python -c 'import sys; print("%d.%d" % sys.version_info[:2])')}

mkdir -p "$folder"
$python -m pip wheel --no-deps --quiet --wheel-dir "$folder" .
ours=$(ls "$folder"/permed_compute-*.whl)
# Newest first: what pip takes where several fit.
platforms=()
for glibc in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do
    platforms+=(--platform "manylinux_${glibc}_${arch}")
done
platforms+=(--platform "manylinux2014_${arch}" --platform any)
$python -m pip download --quiet --only-binary=:all: "${platforms[@]}" --python-version "$version" \
    --implementation cp --abi "cp${version/./}" --abi abi3 --abi none \
    --constraint constraints.txt --dest "$folder" "$ours[$extras]"
cp constraints.txt "$folder"/
(cd "$folder" && sha256sum -- *.whl constraints.txt >SHA256SUMS)
echo "$folder: $(ls "$folder"/*.whl | wc -l) wheels for $arch, Python $version, $(du -sh "$folder" | cut -f1)"
