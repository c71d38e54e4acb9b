#!/bin/bash
# A real SLURM on this machine, for tests: a controller and some nodes, every node a slurmd of its own.
#
#   tests/cluster/slurm.sh start FOLDER [NODES]     prints the SLURM_CONF that its commands need; two nodes by default
#   tests/cluster/slurm.sh stop FOLDER
#
# Jobs of the partition "urgent" preempt those of "main", which are queued again. Keys, logs, sockets and state stay in FOLDER. With NAMESPACES=1 every node has a network, an address (10.88.0.11 and up)
# and a host name of its own, as on a real cluster; jobs then need GLOO_SOCKET_IFNAME=eth0.
# Needs root, and on Debian: apt-get install --no-install-recommends slurm-wlm munge iproute2
set -euo pipefail

readonly BRIDGE=longnet0 NETWORK=10.88.0
command=${1:-} nodes=${3:-2}
if [[ $command != start && $command != stop || -z ${2:-} ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
mkdir -p "$2"
folder=$(realpath "$2")
namespaces=${NAMESPACES:-$([[ -e $folder/namespaces ]] && echo 1 || echo 0)}
export SLURM_CONF=$folder/slurm.conf

controller_address() {
    if [[ $namespaces = 1 ]]; then echo "$NETWORK.1"; else echo 127.0.0.1; fi
}

# Nodes are told apart by address in namespaces, and by port without.
node_lines() {
    local i
    for i in $(seq "$nodes"); do
        if [[ $namespaces = 1 ]]; then
            echo "NodeName=node$i NodeHostname=node$i NodeAddr=$NETWORK.1$i Port=16818 CPUs=$(nproc --all) State=UNKNOWN"
        else
            echo "NodeName=node$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((16900 + i)) CPUs=$(nproc --all) State=UNKNOWN"
        fi
    done
}

# No accounting, no cgroups, no daemon beyond munge. A requeued job waits until the credential of its last start has
# expired, which takes two minutes unless cred_expire says less.
write_configuration() {
    cat > "$SLURM_CONF" <<CONF
ClusterName=longnet
SlurmctldHost=$(hostname -s)($(controller_address))
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=10
MinJobAge=3600
$(node_lines)
PartitionName=main Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=node[1-$nodes] MaxTime=INFINITE State=UP PriorityTier=2
CONF
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$folder/cgroup.conf"
}

start_munge() {
    (umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key")
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
}

make_network() {
    touch "$folder/namespaces"
    ip link add "$BRIDGE" type bridge
    ip addr add "$NETWORK.1/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
    # The nodes see these instead of the machine's: they know each other and ask no name server.
    { cat /etc/hosts; for i in $(seq "$nodes"); do echo "$NETWORK.1$i node$i"; done; } > "$folder/hosts"
    echo 'hosts: files' > "$folder/nsswitch.conf"
}

start_node() {
    local name=node$1 daemon
    mkdir -p "$folder/spool.$name"
    daemon="slurmd -N $name -f $SLURM_CONF"
    if [[ $namespaces != 1 ]]; then
        $daemon
        return
    fi
    ip netns add "longnet-$name"
    ip link add "longnet$1" type veth peer name eth0 netns "longnet-$name"
    ip link set "longnet$1" master "$BRIDGE" up
    ip -n "longnet-$name" addr add "$NETWORK.1$1/24" dev eth0
    ip -n "longnet-$name" link set eth0 up
    ip -n "longnet-$name" link set lo up
    ip -n "longnet-$name" route add default via "$NETWORK.1"
    ip netns exec "longnet-$name" unshare --uts --mount bash -c "hostname $name
        mount --bind '$folder/hosts' /etc/hosts
        mount --bind '$folder/nsswitch.conf' /etc/nsswitch.conf
        exec $daemon"
}

wait_for_nodes() {
    for _ in $(seq 120); do
        [[ $(sinfo --noheader --states=idle --format=%D 2> /dev/null) = "$nodes" ]] && return
        sleep 0.25
    done
    echo "the nodes did not become idle within 30 s; see $folder/*.log" >&2
    sinfo --Node --long >&2
    return 1
}

start() {
    mkdir -p "$folder/state"
    chmod 755 "$folder"
    start_munge
    if [[ $namespaces = 1 ]]; then make_network; fi
    write_configuration
    slurmctld -c -f "$SLURM_CONF"
    for i in $(seq "$nodes"); do start_node "$i"; done
    wait_for_nodes
    echo "$SLURM_CONF"
}

stop() {
    local file name pids=()
    for file in "$folder"/slurmd.*.pid "$folder"/slurmctld.pid "$folder"/munged.pid; do
        if [[ -s $file ]]; then pids+=("$(cat "$file")"); fi
    done
    kill ${pids[@]+"${pids[@]}"} 2> /dev/null || true
    # The next cluster needs their ports.
    for _ in $(seq 100); do
        kill -0 ${pids[@]+"${pids[@]}"} 2> /dev/null || break
        sleep 0.1
    done
    kill -KILL ${pids[@]+"${pids[@]}"} 2> /dev/null || true # a node whose last job does not go away
    if [[ $namespaces = 1 ]]; then
        for name in $(ip netns list | grep -o '^longnet-node[0-9]*'); do ip netns del "$name"; done
        ip link del "$BRIDGE"
        rm -f "$folder/namespaces"
    fi
}

"$command"
