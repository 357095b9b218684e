#!/usr/bin/env bash
# Build latentact's container: containers/build.sh docker|apptainer|enroot|recipes [IMAGE]
#   docker     the image, with docker, podman or buildah
#   apptainer  latentact.sif from it
#   enroot     latentact.sqsh from it
#   recipes    only write latentact.def and latentact.enroot.sh, the recipes of the last two
# TOOL of the environment is the first of docker, podman, buildah by default, BASE an argument of the Dockerfile.
set -euo pipefail

image=${2:-latentact:latest}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The first of these commands that is installed.
first() {
  for name in "$@"; do
    if command -v "$name" >/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "build.sh needs one of: $*; install one of them." >&2
  exit 2
}

docker_image() {
  local tool arguments=()
  tool=${TOOL:-$(first docker podman buildah)}
  if [ -n "${BASE:-}" ]; then arguments+=(--build-arg "BASE=$BASE"); fi
  "$tool" build "${arguments[@]}" --file "$root/containers/Dockerfile" --tag "$image" "$root"
}

# Both recipes take the image of the local daemon and say the same: the program, and no packages of the user's home.
recipes() {
  cat >latentact.def <<DEF
Bootstrap: docker-daemon
From: $image

%environment
    export PATH=/opt/latentact/bin:\$PATH PYTHONNOUSERSITE=1

%runscript
    exec latentact "\$@"

%test
    latentact --help >/dev/null

%help
    latentact: robot policies from video without actions.
    apptainer run --nv --bind DATA latentact.sif COMMAND ...
DEF
  cat >latentact.enroot.sh <<SCRIPT
#!/bin/sh
# enroot start --mount DATA:DATA latentact latentact COMMAND ...
set -eu
enroot import --output latentact.sqsh "dockerd://$image"
enroot create --force --name latentact latentact.sqsh
SCRIPT
  chmod +x latentact.enroot.sh
}

case ${1:-} in
  docker) docker_image ;;
  apptainer)
    recipes
    builder=$(first apptainer singularity)
    "$builder" build latentact.sif latentact.def
    ;;
  enroot)
    recipes
    first enroot >/dev/null
    ./latentact.enroot.sh
    ;;
  recipes) recipes ;;
  *)
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
