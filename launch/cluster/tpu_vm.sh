#!/bin/bash
# Train on a TPU VM slice with gcloud: the same command on every host.
#
#   launch/cluster/tpu_vm.sh create
#   launch/cluster/tpu_vm.sh install
#   launch/cluster/tpu_vm.sh train --config=configs/image_sft.py:klein_4b \
#     --workdir=gcs/runs/image_sft --config.data.train=gcs/data/trajectories.jsonl \
#     --config.save.folder=gs://BUCKET/runs/image_sft/checkpoints
#   launch/cluster/tpu_vm.sh log | stop | delete
#
# Fill in the variables below, or set them. The bucket is mounted as ~/clvr_jax/gcs on every host.
# Resume: `train` with the same arguments. --resume is always given: it begins where no run is.
# `stop` sends SIGTERM, which saves. A preempted slice: delete, create, install, train.
set -euo pipefail

NAME="${NAME:-clvr-jax}"
ZONE="${ZONE:-us-west4-a}"
TYPE="${TYPE:-v5litepod-64}"                    # v6e-32 for v6e
VERSION="${VERSION:-v2-alpha-tpuv5-lite}"       # v2-alpha-tpuv6e for v6e
BUCKET="${BUCKET:?set BUCKET, the name of a bucket in the same region}"
REPOSITORY="${REPOSITORY:-}"                    # URL that the hosts can clone, for install
COMMIT="${COMMIT:-$(git rev-parse HEAD)}"

on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

create() {
  gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
    --version="$VERSION" --scopes=cloud-platform "$@" # --spot, --reserved
}

install() { # Python 3.11 by uv: the image's own is older
  on_all "set -e
    curl -LsSf https://astral.sh/uv/install.sh | sh
    [ -d clvr_jax ] || git clone '${REPOSITORY:?set REPOSITORY}' clvr_jax
    cd clvr_jax && git fetch -q && git checkout -q '$COMMIT'
    [ -d .venv ] || ~/.local/bin/uv venv -q --python 3.11
    ~/.local/bin/uv pip install -q -e '.[tpu]' gcsfs  # gcsfs: for checkpoints in gs://
    repo=gcsfuse-\$(lsb_release -cs)
    key=/usr/share/keyrings/cloud.google.asc
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee \$key > /dev/null
    echo \"deb [signed-by=\$key] https://packages.cloud.google.com/apt \$repo main\" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse"
}

train() {
  local arguments
  arguments=$(printf ' %q' "$@")
  on_all "set -e
    cd clvr_jax && mkdir -p gcs
    mountpoint -q gcs || gcsfuse --implicit-dirs '$BUCKET' gcs
    export JAX_COMPILATION_CACHE_DIR=\$PWD/gcs/xla
    nohup .venv/bin/python -u -m launch.train --resume$arguments > train.log 2>&1 < /dev/null &
    echo \$! > train.pid"
}

log() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=0 \
    --command="tail -n 50 -f clvr_jax/train.log"
}

stop() {
  on_all 'kill -TERM "$(cat clvr_jax/train.pid)"'
}

delete() {
  gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE"
}

case "${1:-}" in
  create | install | train | log | stop | delete) "$@" ;;
  *)
    sed -n '2,13s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
