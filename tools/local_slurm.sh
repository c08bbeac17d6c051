#!/usr/bin/env bash
# A real Slurm on this machine, to try launches on: several nodes (slurmd processes) that share its cores.
#
#   eval "$(tools/local_slurm.sh up)"     start what isn't running, set SLURM_CONF for this shell
#   tools/local_slurm.sh down             end all jobs and daemons
#
# Needs root and Debian's packages, which it installs where they are missing. LOCAL_SLURM_DIR is the folder of all its
# files (/tmp/local-slurm), LOCAL_SLURM_NODES the number of nodes (4), LOCAL_SLURM_PORT the first port (17817).
# Partitions: batch; preempt, whose jobs are requeued when one of batch needs their nodes; limited, to ten minutes and the
# account research. 'down' removes the folder.
set -euo pipefail
DIR=${LOCAL_SLURM_DIR:-/tmp/local-slurm}
NODES=${LOCAL_SLURM_NODES:-4}
PORT=${LOCAL_SLURM_PORT:-17817}
CPUS=8                                   # that a node claims to have
HOST=$(hostname -s)
export SLURM_CONF=$DIR/slurm.conf

die() { echo "local_slurm: $*" >&2; exit 1; }
MARK=$DIR/.local_slurm                   # only a folder of its own is used or removed
if [ -e "$DIR" ] && [ -n "$(ls -A "$DIR")" ] && { [ ! -e "$MARK" ] || [ ! -O "$MARK" ]; }; then
  die "$DIR is not a folder of this script's; set LOCAL_SLURM_DIR to one that doesn't exist"
fi
# Whether the daemon of a pid file is there: a process that has ended may stay a zombie where nobody reaps it, and its
# number may be another program's by now.
lives() {
  [ -s "$1" ] || return 1
  local name=${1##*/} status
  status=$(cat "/proc/$(cat "$1" 2>/dev/null)/status" 2>/dev/null) || return 1
  grep -q "^Name:[[:space:]]*${name%%.*}\$" <<<"$status" && ! grep -q '^State:[[:space:]]*Z' <<<"$status"
}
end_daemon() {
  lives "$1" || { rm -f "$1"; return 0; }
  kill "$(cat "$1")" 2>/dev/null || true
  for _ in $(seq 100); do lives "$1" || break; sleep 0.1; done
  lives "$1" && kill -9 "$(cat "$1")" 2>/dev/null || true
  rm -f "$1"
}

down() {
  if lives "$DIR/slurmctld.pid"; then    # jobs first: their steps outlive the daemons
    timeout 10 scancel --user=root 2>/dev/null || true
    for _ in $(seq 50); do [ -z "$(timeout 5 squeue --noheader 2>/dev/null)" ] && break; sleep 0.2; done
  fi
  for file in "$DIR"/slurmd.*.pid "$DIR/slurmctld.pid" "$DIR/munged.pid"; do end_daemon "$file"; done
  rm -rf "$DIR"
  if ! pgrep -r R,S,D -x slurmctld >/dev/null; then    # another instance uses the same names
    grep -v '# local_slurm$' /etc/hosts >"/tmp/hosts.$$" || true
    cat "/tmp/hosts.$$" >/etc/hosts           # in place: in containers it is mounted
    rm -f "/tmp/hosts.$$"
  fi
}

packages() {
  local missing=() name
  for name in slurmctld slurmd slurm-client munge; do
    dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q '^install ok' || missing+=("$name")
  done
  [ ${#missing[@]} = 0 ] && return
  # Their scripts would start system daemons; 101 is policy-rc.d's "may not".
  [ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; ours=1; }
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >&2 ||
    failed=1
  [ "${ours:-}" ] && rm -f /usr/sbin/policy-rc.d
  [ "${failed:-}" ] && die "apt-get can't install ${missing[*]}"
  return 0
}

configuration() {
  cat <<CONF
ClusterName=local
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its credential has expired, 120 s by default.
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool.%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd.%n.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
# What no node can ever give is refused at once.
EnforcePartLimits=ALL
# Neither cgroups nor binding: the nodes share the cores of one machine.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,sched_max_job_start=0
KillWait=5
SlurmdTimeout=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PropagateResourceLimits=NONE
NodeName=DEFAULT CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=4096
$(for node in $(seq "$NODES"); do echo "NodeName=n$node NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + node))"; done)
PartitionName=DEFAULT Nodes=ALL MaxTime=UNLIMITED State=UP
PartitionName=batch Default=YES PriorityTier=10 DefaultTime=60
PartitionName=limited AllowAccounts=research MaxTime=10
PartitionName=preempt PriorityTier=1 PreemptMode=REQUEUE GraceTime=2
CONF
}

up() {
  [ "$(id -u)" = 0 ] || die "its daemons need root; call it as root, or in a container"
  command -v apt-get >/dev/null || die "it installs Debian's packages, and there is no apt-get"
  packages
  mkdir -p "$DIR"/state "$DIR"/munge
  : >"$MARK"
  chmod 755 "$DIR" "$DIR"/munge          # munged refuses folders that others can write
  if ! lives "$DIR/munged.pid"; then
    rm -f "$DIR"/munge/socket*
    [ -s "$DIR/munge/key" ] || (umask 077; head -c 128 /dev/urandom >"$DIR/munge/key")
    munged --key-file="$DIR/munge/key" --socket="$DIR/munge/socket" --pid-file="$DIR/munged.pid" \
      --log-file="$DIR/munged.log" --seed-file="$DIR/munge/seed" >&2
  fi
  configuration >"$SLURM_CONF.new"
  cmp -s "$SLURM_CONF.new" "$SLURM_CONF" 2>/dev/null || {
    for file in "$DIR"/slurmd.*.pid "$DIR/slurmctld.pid"; do end_daemon "$file"; done
    mv "$SLURM_CONF.new" "$SLURM_CONF"
  }
  rm -f "$SLURM_CONF.new"
  for node in $(seq "$NODES"); do        # ranks find each other by the nodes' names
    getent hosts "n$node" >/dev/null || echo "127.0.0.1 n$node # local_slurm" >>/etc/hosts
  done
  lives "$DIR/slurmctld.pid" || slurmctld </dev/null >&2
  for node in $(seq "$NODES"); do
    mkdir -p "$DIR/spool.n$node"
    lives "$DIR/slurmd.n$node.pid" || slurmd -N "n$node" </dev/null >&2
  done
  for _ in $(seq 200); do
    [ "$(sinfo --noheader --Node --partition=batch --format=%t 2>/dev/null | grep -cE '^(idle|mix|alloc)$')" = "$NODES" ] && {
      echo "export SLURM_CONF=$SLURM_CONF"
      return
    }
    sleep 0.1
  done
  tail -n 3 "$DIR"/slurm*.log >&2
  down
  die "the nodes don't come up; the end of their logs is above"
}

case "${1:-}" in
  up) up ;;
  down) down ;;
  *) die "say up or down" ;;
esac
