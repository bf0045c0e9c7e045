#!/usr/bin/env bash
# permed-compute over a site's own image, as one overlay file: overlay.sh IMAGE.sif OVERLAY.img WHEELS [EXTRAS]
# For sites that forbid pip outside of containers (Olivia: software_stack.md, overlay_images.md of documentation.sigma2.no,
# read 2026-07-02). Run it in a short job without GPUs; one writer at a time. Then, in jobs:
#   apptainer exec --nv --overlay OVERLAY.img:ro IMAGE.sif permed …
set -o errexit -o nounset -o pipefail

image=${1:?the image of the site}
overlay=${2:?the overlay to make}
wheels=$(realpath "${3:?the folder that wheelhouse.sh made}")
extras=${4:-radiology,ray,tracking}
size=${OVERLAY_MIB:-8192}

(cd "$wheels" && sha256sum --check --quiet SHA256SUMS)
apptainer overlay create --sparse --size "$size" --create-dir /opt/permed "$overlay"
# What the image has in the version that is asked for stays. A torch built for its GPUs is another version: compare
# `pip show torch` in the image with constraints.txt first.
apptainer exec --overlay "$overlay" --bind "$wheels" "$image" bash -c '
    export PYTHONUSERBASE=/opt/permed
    python -m pip install --user --no-index --find-links "$1" "permed-compute[$2]"
    find /opt/permed | wc -l
' overlay "$wheels" "$extras" | tail -n 1 | sed "s|\$| files are one file outside: $overlay|"
echo "In jobs: --env PYTHONUSERBASE=/opt/permed, and PATH with /opt/permed/bin before it"
