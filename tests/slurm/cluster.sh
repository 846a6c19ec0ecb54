#!/usr/bin/env bash
# A Slurm cluster of this one machine, all of it in one folder, beside any other that runs here.
#   cluster.sh start FOLDER PORT   makes FOLDER/slurm.conf, for SLURM_CONF; uses PORT and PORT + 1
#   cluster.sh stop FOLDER
set -euo pipefail
folder="$2"

start() {
  # A requeued job waits until its first run's credential has expired: 5 seconds, not 2 minutes.
  local port="$1" node
  node="$(hostname -s)"
  mkdir -p "$folder"/{state,spool,log}
  (umask 077 && head -c 128 /dev/urandom > "$folder/munge.key")
  cat > "$folder/slurm.conf" << END
ClusterName=tests
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$node NodeAddr=127.0.0.1 CPUs=4 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=$node Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=urgent Nodes=$node MaxTime=INFINITE PriorityTier=9 State=UP
END
  # Two GPUs in Slurm's books: any two devices will do.
  printf 'Name=gpu File=/dev/%s\n' null zero > "$folder/gres.conf"
  # Forced: the folder may be readable by its owner alone, who runs everything here.
  munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
    --pid-file="$folder/munged.pid" --log-file="$folder/log/munged.log" \
    --seed-file="$folder/munge.seed" 2> /dev/null
  export SLURM_CONF="$folder/slurm.conf"
  slurmctld
  slurmd
  for _ in $(seq 100); do
    if [ "$(sinfo --noheader --partition main --format %t 2> /dev/null)" = idle ]; then return; fi
    sleep 0.2
  done
  echo "cluster.sh: the node is not ready after 20 s; see $folder/log" >&2
  return 1
}

stop() {
  local name pid
  for name in slurmd slurmctld munged; do
    if ! pid="$(cat "$folder/$name.pid" 2> /dev/null)"; then continue; fi
    kill "$pid" 2> /dev/null || continue
    for _ in $(seq 50); do
      if ! kill -0 "$pid" 2> /dev/null; then continue 2; fi
      sleep 0.1
    done
    kill -9 "$pid" 2> /dev/null || true
  done
}

case "$1" in
  start) start "$3" || { stop; exit 1; } ;;
  stop) stop ;;
esac
