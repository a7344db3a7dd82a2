#!/bin/sh
# First and last program of a virtual machine: mounts what the tests need, runs them, turns the machine off.
# Parameters come with the kernel's: profiler.cgroup=v1|v2, profiler.tests=NAME,NAME
# Programs of the host come before those of the same names in busybox.
export PATH=/usr/bin:/bin HOME=/
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /tmp /run
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
# Programs that are run by their descriptor are refused where it has no path: by TOMOYO, which 5.10 begins with.
ln -s /proc/self/fd /dev/fd
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs shm /dev/shm
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing
mount -t bpf bpf /sys/fs/bpf

parameter() {
    tr ' ' '\n' < /proc/cmdline | sed -n "s/^profiler\.$1=//p" | tr ',' ' '
}

case "$(parameter cgroup)" in
v1)
    mount -t tmpfs cgroup /sys/fs/cgroup
    for controllers in cpu,cpuacct cpuset memory perf_event pids freezer devices blkio; do
        mkdir -p "/sys/fs/cgroup/$controllers"
        mount -t cgroup -o "$controllers" cgroup "/sys/fs/cgroup/$controllers"
    done
    mkdir -p /sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
    ;;
v2)
    mount -t cgroup2 cgroup /sys/fs/cgroup
    # As systemd does, or no group below the root has a limit.
    echo +cpu +memory +pids > /sys/fs/cgroup/cgroup.subtree_control
    ;;
esac

# Debian's kernels begin with 3, a level of their own that refuses events to all but CAP_SYS_ADMIN.
echo 2 > /proc/sys/kernel/perf_event_paranoid
# Programs may be given more locked memory than they begin with, which before 5.11 is 64 KiB.
ulimit -H -l unlimited
ip link set lo up
uname -a

# Emulated processors are slow.
export PROFILER_TEST_PATIENCE=2 PROFILER_TEST_HZ=99 PROFILER_TEST_NICE=19
export PROFILER_TEST_PROGRAMS=deep_gcc,deep_static,deep_musl,throw_gcc,rust_deep,cgoburn,python3
# Where each process is in the kernel.
tell_where() {
    sleep 540
    for process in /proc/[0-9]*; do
        readlink "$process/exe" > /dev/null || continue
        echo "-- $(cat "$process/comm") $(sed -n 's/^State:\t//p' "$process/status"): $(cat "$process"/task/*/stack)"
    done
}

cd /tmp
for test in $(parameter tests); do
    echo "== begin $test"
    tell_where &
    # One that hangs is ended, so that the others run.
    timeout -s KILL 600 "/tests/$test" --ignored --test-threads=1 --nocapture 2>&1
    echo "== end $test $?"
    read -r uptime idle < /proc/uptime
    echo "-- $uptime s, $idle s of them idle"
    # What a test that was killed has started would run beside the next one.
    kill -KILL -1
done
poweroff -f
