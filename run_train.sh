#!/usr/bin/env bash
# Starts training on this machine: checks the configuration, then runs train.py under torchrun and forwards signals.
#
#   ./run_train.sh --config FILE [--section.key value | --section.key=value ...]      (--help lists every key)
#
# --max-restarts N, anywhere: when a rank dies, say by `kill -9`, all are started again and go on from the newest
# checkpoint, N times at most; default 0. A mistake is not tried again.
#
# Environment, all optional:
#   NGPU         processes on this node; default: the number of GPUs, or 2 on a machine with none
#   NNODES       nodes; run this script once on each, with the same arguments and
#   NODE_RANK      its own number, 0 to NNODES - 1,
#   MASTER_ADDR    the host of node 0, and
#   MASTER_PORT    a free port there (default 29500)
#   LOG_RANK     whose log is shown: global ranks, comma-separated; default 0
#   PYTHON       the interpreter; default: python
#
# Exit status: 2 and one line on stderr for a mistake, also for one that only the ranks find; 1 if a rank fails.
# SIGTERM and SIGINT (Ctrl-C) go to the ranks, which finish their step, save, and exit 0, and so does this script; a
# second signal ends everything at once. With several nodes it is enough to signal one of them: its ranks tell the
# others, and all stop after the same step. docs/running.md has the rest.
set -uo pipefail

fail() {
  echo "$1" >&2
  exit 2
}

folder=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
python=${PYTHON:-python}
command -v "$python" >/dev/null || fail "PYTHON = '$python': expected a Python interpreter"
export PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH} # and -P: a folder here may be called "config" or "data" too

for argument in "$@"; do
  case $argument in --help | -h) exec "$python" -P -m config.checks --world-size 1 --help ;; esac
done

restarts=0 arguments=()
while (($#)); do
  case $1 in
    --max-restarts) restarts=${2:-} && shift ;;
    --max-restarts=*) restarts=${1#*=} ;;
    *) arguments+=("$1") ;;
  esac
  shift || break
done
set -- "${arguments[@]+"${arguments[@]}"}"

# Only torch knows how many GPUs it can use; importing it takes seconds, so not where there can be none.
gpus=0
if command -v nvidia-smi >/dev/null; then
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') || exit
fi
nproc_per_node=${NGPU:-$((gpus > 0 ? gpus : 2))}
nnodes=${NNODES:-1} node_rank=${NODE_RANK:-0} port=${MASTER_PORT:-29500}
export LOG_RANK=${LOG_RANK:-0}

positive='^[1-9][0-9]{0,5}$' number='^(0|[1-9][0-9]{0,5})$'
[[ $nproc_per_node =~ $positive ]] || fail "NGPU = '$nproc_per_node': expected a positive integer"
((gpus > 0 || nproc_per_node <= 1024)) || fail "NGPU = '$nproc_per_node': expected at most 1024 processes on CPUs"
((gpus == 0 || nproc_per_node <= gpus)) || fail "NGPU = '$nproc_per_node': expected at most the $gpus GPUs here"
[[ $nnodes =~ $positive ]] || fail "NNODES = '$nnodes': expected a positive integer"
[[ $node_rank =~ $number ]] && ((node_rank < nnodes)) ||
  fail "NODE_RANK = '$node_rank': expected an integer from 0 to $((nnodes - 1)) (NNODES = $nnodes)"
((nnodes == 1)) || [[ -n ${MASTER_ADDR:-} ]] || fail "MASTER_ADDR = '': expected the host of node 0 (NNODES = $nnodes)"
[[ $port =~ $positive ]] && ((port < 65536)) || fail "MASTER_PORT = '$port': expected a port from 1 to 65535"
[[ ,$LOG_RANK =~ ^(,(0|[1-9][0-9]{0,5}))+$ ]] || fail "LOG_RANK = '$LOG_RANK': expected ranks, separated by commas"
[[ $restarts =~ ^(0|[1-9][0-9]{0,3})$ ]] || fail "--max-restarts = '$restarts': expected an integer of at least 0"
((nnodes == 1 || port + restarts < 65536)) ||
  fail "MASTER_PORT = '$port': expected a port of at most $((65535 - restarts)): each of $restarts restarts takes the next"
world_size=$((nnodes * nproc_per_node))
for rank in ${LOG_RANK//,/ }; do
  ((rank < world_size)) || fail "LOG_RANK = '$LOG_RANK': expected ranks below $world_size, the number of processes"
done

"$python" -P -m config.checks --world-size "$world_size" "$@" || exit

# On CPUs the processes share the cores: torchrun's default of one thread each would leave some idle.
if ((gpus == 0)) && [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=$((cores > nproc_per_node ? cores / nproc_per_node : 1))
fi

if ((nnodes == 1)); then
  rendezvous=(--standalone --local-addr 127.0.0.1) # on a free port: several runs on one machine do not meet
else
  rendezvous=(--nnodes "$nnodes" --node-rank "$node_rank" --master-addr "$MASTER_ADDR" --master-port "$port"
    --rdzv-conf timeout=1800) # after a restart, how long a node waits for the others to notice too
fi

# torchrun makes exit 1 and a traceback of a signal, whatever its ranks do. So it never sees one: the ranks get it, and
# torchrun waits for them. `set -m` gives it a process group of its own, out of reach of a terminal's Ctrl-C.
signal=""
on_signal() { # name, number
  if [[ -n $signal ]]; then
    local ranks
    ranks=$(pgrep -P "$torchrun")
    # shellcheck disable=SC2086  # one word a process
    kill -KILL $ranks 2>/dev/null
    kill -TERM "$torchrun" 2>/dev/null
    exit $((128 + $2))
  fi
  signal=$1 pending=1
}
torchrun="" pending=0
trap 'on_signal TERM 15' TERM
trap 'on_signal INT 2' INT
set -m
"$python" -P -m training.launch "$restarts" "${rendezvous[@]}" --nproc-per-node "$nproc_per_node" --max-restarts 0 \
  "$folder/train.py" "$@" &
torchrun=$!
set +m

# Forwards the signal. Fails while a rank is missing or has no handler yet: the signal would kill it where it stands.
forward_signal() {
  local ranks rank caught
  ranks=$(pgrep -P "$torchrun") && (($(wc -w <<<"$ranks") == nproc_per_node)) || return
  for rank in $ranks; do
    # SigCgt is the mask of the signals that a process catches, in hexadecimal; 0x4000 is SIGTERM.
    caught=$(awk '/^SigCgt/ { print $2 }' "/proc/$rank/status" 2>/dev/null)
    caught=${caught:-0000}
    [[ ! -d /proc/self ]] || ((0x${caught: -4} & 0x4000)) || return
  done
  # shellcheck disable=SC2086
  kill -s "$signal" $ranks 2>/dev/null
  kill -USR1 "$torchrun" 2>/dev/null # no restart from now on
}

# `wait` returns early when a trap has run, and says 127 when the status was collected before.
status=127
while true; do
  if ((pending)); then
    if forward_signal || ! kill -0 "$torchrun" 2>/dev/null; then
      pending=0
    else
      sleep 0.1
      continue
    fi
  fi
  wait "$torchrun"
  code=$?
  ((code == 127)) || status=$code
  ((pending)) || exit "$status"
done
