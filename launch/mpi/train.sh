#!/bin/bash
# Train under MPI, a process for each rank. From the checkout, on a file system that all machines share:
#
#   RANKS=16 launch/mpi/train.sh [CONFIG.yaml] [key=value ...]
#
# MPI only says who the ranks are (through mpi4py: pip install '.[mpi]'); NCCL or gloo carry the data. Inside a job of SLURM,
# PBS or LSF mpirun knows the machines; elsewhere name a file of lines "host slots=8" in HOSTFILE.
# Written for Open MPI. MPICH and Intel MPI: mpiexec -n RANKS [-f HOSTFILE] python launch/train.py ...
#
# SIGUSR1 to mpirun reaches all ranks: they write a checkpoint and leave with status 75, which is then mpirun's; start the
# same command again to go on. (After SIGTERM mpirun leaves the ranks only seconds.)
set -euo pipefail
cd "$(dirname "$0")/../.."

ranks="${RANKS:-2}"
python="${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}"
# Bound to one core each, the ranks could start no threads.
options=(--bind-to none)
if [[ -n ${HOSTFILE:-} ]]; then options+=(--hostfile "$HOSTFILE"); fi
# Environment variables for the other machines, further settings: MPIRUN_OPTIONS="-x NCCL_SOCKET_IFNAME=ib0 --oversubscribe"
read -ra more <<< "${MPIRUN_OPTIONS:-}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec mpirun -n "$ranks" -x PYTHONPATH "${options[@]}" ${more[@]+"${more[@]}"} "$python" launch/train.py "$@"
