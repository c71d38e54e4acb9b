#!/bin/bash
# Build and try the images on a Debian machine that has no Docker engine and reaches no registry of images.
#
#   docker/build_offline.sh [cpu] [gpu]          both by default; as root
#
# buildah builds the Dockerfiles as they are. Each FROM image is replaced by a bootstrap of Debian with Debian's own Python,
# under the name that FROM asks for; Debian therefore stands in for the Ubuntu of NVIDIA's image. The CPU image then trains
# the quick start. The GPU image imports its libraries, compiles DeepSpeed's optimizer for offload and runs `longnet doctor`.
#
# Both take less than an hour on two cores, and 30 GB of disk. Settings, as environment variables:
#   WORK         folder for images and logs, which later runs use again (/var/tmp/longnet-images)
#   MIRROR       Debian's archive (http://deb.debian.org/debian)
#   TORCH_INDEX  where the CPU image gets torch, if not from the index that the Dockerfile names
#   QUICKSTART   settings of the quick start: "train.steps=20" by default, "" for the whole of it
#   PIP_CONF, APT_CONF, CERTIFICATES
#                files, and a folder, of the build machine that the steps of the build see as /etc/pip.conf,
#                /etc/apt/apt.conf.d/99build and /etc/ssl/certs; they do not become part of an image
# Needs, on Debian: apt-get install --no-install-recommends buildah debootstrap
set -euo pipefail
cd "$(dirname "$0")/.."

readonly WORK="${WORK:-/var/tmp/longnet-images}"
readonly MIRROR="${MIRROR:-http://deb.debian.org/debian}"
readonly SUITE_FOR_CUDA=trixie # it stands in for Ubuntu 24.04: both have Python 3.12 or newer and glibc 2.39 or newer

fail() {
    echo "error: $*" >&2
    exit 2
}

# Containers are plain folders (vfs) entered by chroot, which works where no container may be nested.
store() {
    local command=$1
    shift
    case $command in
    bud | from | run) set -- --isolation chroot "$@" ;;
    esac
    buildah --storage-driver vfs --root "$WORK/storage" --runroot "$WORK/run" "$command" "$@"
}

# What the build machine lends to each step, as options of buildah.
lend() {
    [[ -z ${PIP_CONF:-} ]] || echo "--volume=$(realpath "$PIP_CONF"):/etc/pip.conf:ro"
    [[ -z ${APT_CONF:-} ]] || echo "--volume=$(realpath "$APT_CONF"):/etc/apt/apt.conf.d/99build:ro"
    [[ -z ${CERTIFICATES:-} ]] || echo "--volume=$(realpath "$CERTIFICATES"):/etc/ssl/certs:ro"
}

bootstrap() { # FOLDER SUITE [PACKAGE...]
    local folder=$1 suite=$2 packages
    shift 2
    packages=$(printf ',%s' ca-certificates netbase tzdata "$@")
    debootstrap --variant=minbase --include="${packages:1}" "$suite" "$folder" "$MIRROR" > "$WORK/debootstrap.log" ||
        fail "debootstrap of $suite failed; see $WORK/debootstrap.log"
    rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
}

# The official Python image has pip, Python's headers and no compiler, and lets pip install into the system.
python_base() { # NAME CONTAINER FOLDER
    local name=$1 container=$2 folder=$3 version=${1#*:} suite=${1##*-} found
    version=${version%%-*}
    bootstrap "$folder" "$suite" python3 python3-pip python3-dev
    found=$(chroot "$folder" python3 -c 'import sys; print(sys.version.split()[0])')
    [[ $found = "$version" || $found = "$version".* ]] ||
        fail "$name asks for Python $version, but Debian's $suite has $found; name the suite that has it in FROM"
    rm -f "$folder"/usr/lib/python3*/EXTERNALLY-MANAGED
    ln -s /usr/bin/python3 "$folder/usr/local/bin/python"
    store config --cmd python3 "$container"
}

# NVIDIA's base image has neither Python nor a compiler, and asks the container runtime for the GPUs.
cuda_base() { # NAME CONTAINER FOLDER
    bootstrap "$3" "$SUITE_FOR_CUDA"
    store config --env NVIDIA_VISIBLE_DEVICES=all --env NVIDIA_DRIVER_CAPABILITIES=compute,utility "$2"
}

make_base() { # NAME
    local name=$1 container
    if store inspect --type image "docker.io/$name" > /dev/null 2>&1; then return; fi
    echo "making a base in place of $name"
    container=$(store from scratch)
    case $name in
    library/python:*) python_base "$name" "$container" "$(store mount "$container")" ;;
    nvidia/cuda:*) cuda_base "$name" "$container" "$(store mount "$container")" ;;
    *) fail "FROM $name is neither python:... nor nvidia/cuda:...; add a function to docker/build_offline.sh that makes it" ;;
    esac
    store umount "$container" > /dev/null
    store commit --quiet --rm "$container" "docker.io/$name" > /dev/null
}

build() { # IMAGE DOCKERFILE [OPTION OF bud...]
    local image=$1 file=$2 base lent
    shift 2
    base=$(sed -n 's/^FROM //p' "$file")
    [[ $base = */* ]] || base=library/$base
    make_base "$base"
    mapfile -t lent < <(lend)
    # What a run before this one left behind takes as much room as the image that is built now.
    leave "$image" 2> /dev/null || true
    store rmi "localhost/$image" > /dev/null 2>&1 || true
    echo "building $image; the log is $WORK/$image.log"
    store bud --pull-never --format docker "${lent[@]}" "$@" -t "$image" -f "$file" . > "$WORK/$image.log" 2>&1 ||
        { tail -n 30 "$WORK/$image.log" >&2; fail "the build of $image failed; see $WORK/$image.log"; }
}

# Each image gets one container, in which the commands of its try run one after the other.
enter() { # IMAGE COMMAND...
    local image=$1
    shift
    store inspect --type container "try-$image" > /dev/null 2>&1 || store from --name "try-$image" "localhost/$image" > /dev/null
    echo "$image: $*"
    store run "try-$image" -- "$@"
}

leave() { # IMAGE
    store rm "try-$1" > /dev/null
}

cpu() {
    build longnet-cpu docker/Dockerfile.cpu ${TORCH_INDEX:+--build-arg "TORCH_INDEX=$TORCH_INDEX"}
    local settings
    read -ra settings <<< "${QUICKSTART-train.steps=20}"
    enter longnet-cpu longnet doctor
    enter longnet-cpu longnet quickstart "${settings[@]}"
    leave longnet-cpu
}

gpu() {
    build longnet-gpu docker/Dockerfile
    enter longnet-gpu python -c 'import longnet_dist, torch, triton; print(torch.__version__, triton.__version__)'
    enter longnet-gpu python -c 'import flash_attn.cute.interface, quack.gemm_interface; print("flash-attn 4 and quack import")'
    enter longnet-gpu env DS_ACCELERATOR=cuda python -c \
        'from deepspeed.ops.op_builder import CPUAdamBuilder; print(CPUAdamBuilder().load(verbose=False))'
    enter longnet-gpu longnet doctor
    leave longnet-gpu
}

if (($# == 0)); then set -- cpu gpu; fi
for image in "$@"; do
    [[ $image = cpu || $image = gpu ]] || fail "there is no image $image; name cpu, gpu or both"
done
((EUID == 0)) || fail "debootstrap and chroot need root, but the user's number is $EUID; run this with sudo"
for program in buildah debootstrap; do
    command -v "$program" > /dev/null || fail "$program is not installed; apt-get install --no-install-recommends $program"
done
mkdir -p "$WORK"
for image in "$@"; do "$image"; done
