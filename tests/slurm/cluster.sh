#!/usr/bin/env bash
# A SLURM of two nodes on this host, for tests: a munged, a slurmctld and two slurmd of its own.
# All that they write lies in FOLDER.
#   tests/slurm/cluster.sh start FOLDER    then, with SLURM_CONF=FOLDER/slurm.conf, sbatch, squeue ... speak to it
#   tests/slurm/cluster.sh stop FOLDER     kills its daemons and its jobs, if there are any
# Needs Debian's slurm-wlm and munge, but no systemd, no cgroups and nothing in /etc.
set -euo pipefail
if ! [[ $# = 2 && $1 =~ ^(start|stop)$ ]]; then
    echo "cluster.sh: got '$*', expected two words: start FOLDER, or stop FOLDER" >&2
    exit 2
fi
PATH=$PATH:/usr/sbin
mkdir -p "$2"
folder=$(cd "$2" && pwd)
export SLURM_CONF=$folder/slurm.conf

# Process ids of the cluster's daemons and jobs. Their environment names its configuration, also when their parents are
# gone.
members() {
    local place
    for place in $(grep -lszxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ); do
        place=${place%/environ}
        if grep -qsxE "munged|slurm[a-z]+" "$place/comm" || grep -qsz "^SLURM_JOB_ID=" "$place/environ"; then
            echo "${place#/proc/}"
        fi
    done
}

# Killed, as nothing of it is kept; again until none is left, as a daemon may have started another meanwhile.
stop() {
    local left
    for _ in $(seq 100); do
        left=$(members)
        [ -n "$left" ] || return 0
        kill -KILL $left 2>/dev/null || true
        sleep 0.1
    done
    echo "cluster.sh: processes" $left "of $folder are still there after 10 s of kill -9; look at them with ps" >&2
    return 1
}

start() {
    local program ports host user idle
    for program in munged slurmctld slurmd sbatch; do
        if ! type $program >/dev/null 2>&1; then
            echo "cluster.sh: $program is missing; apt-get install slurm-wlm munge" >&2
            return 1
        fi
    done
    ports=($(python3 -c 'import socket
found = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*[each.getsockname()[1] for each in found])'))
    host=${HOSTNAME%%.*} user=$(id -un)
    # The nodes' names are addresses of this host: jobs take a node's name for MASTER_ADDR, and it has to be found.
    # A job that was requeued waits until its credentials have expired: 5 s is the least.
    # A job that has ended is remembered for an hour, so that tests can ask how it ended.
    # A job that is past its time limit has been warned, but is killed only 5 minutes later: time for a slow host.
    # A job's port follows from its number: two clusters at a time on this host must not both begin with 1.
    cat > "$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
FirstJobId=$((RANDOM % 9000 + 1))
SlurmUser=$user
SlurmdUser=$user
MinJobAge=3600
OverTimeLimit=5
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.1 NodeHostname=$host Port=${ports[1]} CPUs=4
NodeName=127.0.0.2 NodeHostname=$host Port=${ports[2]} CPUs=4
PartitionName=normal Nodes=ALL Default=YES GraceTime=120
PartitionName=urgent Nodes=ALL PriorityTier=2
END
    rm -rf "$folder/state" "$folder"/127.0.0.[12]
    mkdir "$folder/state"
    (umask 077 && head -c 128 /dev/urandom > "$folder/munge.key")
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
    slurmctld
    slurmd -N 127.0.0.1
    slurmd -N 127.0.0.2
    for _ in $(seq 300); do
        idle=$(timeout 10 sinfo --noheader --responding --states=idle --partition=normal --format=%D \
            2>/dev/null) || idle=0
        [ "$idle" != 2 ] || return 0
        sleep 0.1
    done
    echo "cluster.sh: no two idle nodes within 30 s; the logs in $folder say why" >&2
    return 1
}

stop
if [ "$1" = start ]; then
    trap 'code=$?; [ $code = 0 ] || stop; exit $code' EXIT
    start
fi
