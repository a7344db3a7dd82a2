//! The machine: kernel, privileges, security modules, limits, cgroups, runtimes.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use super::{Finding, Host, kernel};
use crate::{
    languages::{self, Language},
    sys::{
        capabilities::{self, Capability},
        perf_event,
    },
};

/// Processes looked at for runtimes.
const PROCESSES_MAX: usize = 65_536;
/// Inode of the initial pid namespace. Source: include/linux/proc_ns.h: PROC_PID_INIT_INO.
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";

/// Everything about the machine, in the order of reading.
pub(super) fn findings(host: Host<'_>) -> Vec<Finding> {
    let Host { proc, sys } = host;
    let mut findings = vec![kernel(proc), type_information(sys), bpf(proc)];
    findings.extend(capabilities(proc));
    findings.extend([
        lockdown(sys),
        security_modules(proc, sys),
        locked_memory(proc),
        perf_paranoia(proc),
        kernel_symbols(proc),
        tracefs(sys),
        probes(sys),
        pid_namespace(proc),
        cgroups(proc),
        runtimes(proc),
    ]);
    findings
}

fn read(root: &Path, name: &str) -> Option<String> {
    fs::read_to_string(root.join(name)).ok().map(|text| text.trim().to_owned())
}

fn kernel(proc: &Path) -> Finding {
    const WHAT: &str = "kernel";
    let release = read(proc, "sys/kernel/osrelease").unwrap_or_default();
    match kernel::running(proc).map(|version| (version, kernel::judge(version))) {
        None => Finding::partly(WHAT, format!("{release:?} cannot be read"), "Linux 5.10 or later is needed"),
        Some((version, Ok(()))) => Finding::yes(WHAT, format!("Linux {version} ({release})")),
        Some((_, Err(error))) => Finding::no(WHAT, error.to_string(), "boot a newer kernel"),
    }
}

fn type_information(sys: &Path) -> Finding {
    const WHAT: &str = "type information";
    let path = "kernel/btf/vmlinux";
    match fs::File::open(sys.join(path)) {
        Ok(_) => Finding::yes(WHAT, format!("/sys/{path}")),
        Err(error) => Finding::no(
            WHAT,
            format!("/sys/{path}: {error}"),
            "use a kernel with CONFIG_DEBUG_INFO_BTF=y, as all large distributions have; mount /sys",
        ),
    }
}

fn bpf(proc: &Path) -> Finding {
    const WHAT: &str = "BPF";
    let setting = |name: &str| read(proc, &format!("sys/{name}")).unwrap_or_else(|| "-".to_owned());
    let (jit, unprivileged) =
        (setting("net/core/bpf_jit_enable"), setting("kernel/unprivileged_bpf_disabled"));
    let found = format!("bpf_jit_enable {jit}, unprivileged_bpf_disabled {unprivileged}");
    match jit.as_str() {
        "0" => Finding::partly(
            WHAT,
            found,
            "sysctl net.core.bpf_jit_enable=1: interpreted programs cost ten times",
        ),
        _ => Finding::yes(WHAT, found),
    }
}

fn capabilities(proc: &Path) -> Vec<Finding> {
    let status = read(proc, "self/status").unwrap_or_default();
    let missing = capabilities::missing_from(capabilities::effective(&status).unwrap_or(0));
    let finding = |&capability: &Capability| {
        let (what, gives) = (capability.to_string(), capability.gives());
        let advice = "run as root, or give the container this capability";
        match (missing.contains(&capability), capability) {
            (false, _) => Finding::yes(&what, gives),
            (true, Capability::SysResource) => Finding::info(&what, format!("missing: {gives}")),
            (true, needed) if needed.is_needed() => Finding::no(&what, format!("missing: {gives}"), advice),
            (true, _) => Finding::partly(&what, format!("missing: {gives}"), advice),
        }
    };
    Capability::USED.iter().map(finding).collect()
}

/// Source: kernel_lockdown(7); `confidentiality` refuses bpf_probe_read_kernel.
fn lockdown(sys: &Path) -> Finding {
    const WHAT: &str = "lockdown";
    let modes = read(sys, "kernel/security/lockdown").unwrap_or_default();
    let mode = modes.split('[').nth(1).and_then(|rest| rest.split(']').next()).unwrap_or("none");
    match mode {
        "confidentiality" => {
            Finding::no(WHAT, mode, "boot with lockdown=integrity: this mode forbids to read kernel memory")
        }
        _ => Finding::yes(WHAT, mode),
    }
}

fn security_modules(proc: &Path, sys: &Path) -> Finding {
    const WHAT: &str = "security modules";
    let is_apparmor = read(sys, "module/apparmor/parameters/enabled").is_some_and(|text| text == "Y");
    let selinux = match read(sys, "fs/selinux/enforce").as_deref() {
        Some("1") => Some("SELinux enforcing"),
        Some(_) => Some("SELinux permissive"),
        None => None,
    };
    let confined_by = read(proc, "self/attr/current").unwrap_or_default();
    let confined_by = confined_by.trim_end_matches('\0');
    let mut found: Vec<&str> = selinux.into_iter().collect();
    if is_apparmor {
        found.push("AppArmor");
    }
    let is_confined = is_apparmor && !matches!(confined_by, "" | "unconfined");
    match (found.as_slice(), is_confined) {
        ([], _) => Finding::yes(WHAT, "none that confine"),
        (_, false) => Finding::yes(WHAT, format!("{}; this process: {confined_by:?}", found.join(", "))),
        (_, true) => Finding::partly(
            WHAT,
            format!("{}; this process is confined: {confined_by}", found.join(", ")),
            "if processes cannot be read, run unconfined (appArmorProfile: Unconfined)",
        ),
    }
}

/// Source: proc_pid_limits(5).
fn locked_memory(proc: &Path) -> Finding {
    const WHAT: &str = "locked memory";
    let limits = read(proc, "self/limits").unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    let soft = line.and_then(|line| line.split_whitespace().next()).unwrap_or("unknown");
    Finding::info(WHAT, format!("limit {soft}; matters before Linux 5.11 only, where maps count against it"))
}

fn perf_paranoia(proc: &Path) -> Finding {
    const WHAT: &str = "perf_event_paranoid";
    let Some(level) = perf_event::paranoia(proc) else { return Finding::info(WHAT, "-") };
    let status = read(proc, "self/status").unwrap_or_default();
    let effective = capabilities::effective(&status).unwrap_or(0);
    if level <= perf_event::PARANOIA_MAX || capabilities::has(effective, Capability::SysAdmin) {
        return Finding::info(WHAT, format!("{level}; does not matter to who has CAP_PERFMON"));
    }
    Finding::partly(
        WHAT,
        format!("{level}; kernels of Debian and Ubuntu refuse events to all without CAP_SYS_ADMIN"),
        "sysctl kernel.perf_event_paranoid=2, or give the container CAP_SYS_ADMIN",
    )
}

/// The kernel shows all addresses as zeros to whom it hides them from. To others, some of the first are zeros too.
fn kernel_symbols(proc: &Path) -> Finding {
    const WHAT: &str = "kernel symbols";
    const SYMBOLS: usize = 1000;
    let restrict = read(proc, "sys/kernel/kptr_restrict").unwrap_or_else(|| "-".to_owned());
    let is_shown = lines(&proc.join("kallsyms"), SYMBOLS).iter().any(|line| {
        let address = line.split(' ').next().unwrap_or_default();
        address.chars().any(|digit| digit != '0')
    });
    match (is_shown, proc.join("modules").exists()) {
        (true, true) => Finding::yes(WHAT, "/proc/kallsyms"),
        (true, false) => Finding::yes(WHAT, "/proc/kallsyms; no /proc/modules: this kernel has none"),
        (false, _) => Finding::partly(
            WHAT,
            format!("/proc/kallsyms hides addresses (kptr_restrict {restrict})"),
            "give CAP_SYSLOG; with kptr_restrict 2 nobody sees them: kernel frames show as [kernel]",
        ),
    }
}

/// Lines of a file that may be large.
fn lines(path: &Path, count: usize) -> Vec<String> {
    use std::io::{BufRead as _, BufReader, Read as _};
    const BYTES_MAX: u64 = 1 << 20;
    let Ok(file) = fs::File::open(path) else { return Vec::new() };
    BufReader::new(file.take(BYTES_MAX)).lines().map_while(Result::ok).take(count).collect()
}

fn tracefs(sys: &Path) -> Finding {
    let at = ["kernel/tracing", "kernel/debug/tracing"];
    let mounted: Vec<_> = at.iter().filter(|path| sys.join(path).join("events").exists()).collect();
    let found = mounted.first().map_or("not mounted".to_owned(), |path| format!("/sys/{path}"));
    Finding::info("tracefs", format!("{found}; the agent uses raw tracepoints and does without"))
}

fn probes(sys: &Path) -> Finding {
    let has = |kind: &str| sys.join("bus/event_source/devices").join(kind).exists();
    let kinds: Vec<_> = ["kprobe", "uprobe"].into_iter().filter(|kind| has(kind)).collect();
    let found = if kinds.is_empty() { "neither kprobes nor uprobes".to_owned() } else { kinds.join(", ") };
    Finding::info("dynamic probes", format!("{found}; on-CPU profiles do without"))
}

fn pid_namespace(proc: &Path) -> Finding {
    const WHAT: &str = "pid namespace";
    let link = fs::read_link(proc.join("self/ns/pid")).unwrap_or_default();
    match link.to_str() {
        Some(INITIAL_PID_NAMESPACE) => Finding::yes(WHAT, "that of the machine"),
        other => Finding::no(
            WHAT,
            format!("{:?} is not that of the machine: processes cannot be found", other.unwrap_or_default()),
            "run with the host's pid namespace (hostPID: true, --pid=host)",
        ),
    }
}

fn cgroups(proc: &Path) -> Finding {
    const WHAT: &str = "cgroups";
    let mounts = read(proc, "self/mounts").unwrap_or_default();
    let kinds: BTreeSet<_> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(2))
        .filter(|kind| matches!(*kind, "cgroup" | "cgroup2"))
        .collect();
    match (kinds.contains("cgroup"), kinds.contains("cgroup2")) {
        (false, true) => Finding::yes(WHAT, "v2"),
        (true, true) => Finding::yes(WHAT, "v1 with v2 beside it (hybrid)"),
        (true, false) => Finding::yes(WHAT, "v1"),
        (false, false) => Finding::partly(
            WHAT,
            "no hierarchy is mounted here",
            "labels come from /proc/PID/cgroup and need none; mount /sys/fs/cgroup to follow moves",
        ),
    }
}

/// Programs that run containers.
const CONTAINER_RUNTIMES: [(&str, &str); 5] = [
    ("containerd", "containerd"),
    ("dockerd", "Docker"),
    ("crio", "CRI-O"),
    ("podman", "Podman"),
    ("kubelet", "kubelet"),
];

fn runtimes(proc: &Path) -> Finding {
    let entries = fs::read_dir(proc).into_iter().flatten().flatten().take(PROCESSES_MAX);
    let pids: Vec<PathBuf> =
        entries.filter(|entry| is_number(&entry.file_name())).map(|entry| entry.path()).collect();
    let names: BTreeSet<String> = pids
        .iter()
        .filter_map(|pid| fs::read_link(pid.join("exe")).ok())
        .filter_map(|exe| Some(exe.file_name()?.to_str()?.to_owned()))
        .collect();
    let containers = CONTAINER_RUNTIMES.iter().filter(|(name, _)| names.contains(*name));
    let containers = containers.map(|&(_, shown)| shown.to_owned());
    let running = |language: &&Language| {
        names.iter().any(|name| languages::of_executable(name).is_some_and(|found| found == *language))
    };
    let languages = languages::ALL.iter().filter(running);
    let languages = languages.map(|language| format!("{} (for names: {})", language.name, language.switch));
    let found: Vec<_> = containers.chain(languages).collect();
    let found = if found.is_empty() { "none".to_owned() } else { found.join("; ") };
    Finding::info("runtimes", format!("{found} (of {} processes)", pids.len()))
}

fn is_number(name: &std::ffi::OsStr) -> bool {
    name.to_str().is_some_and(|name| name.parse::<u32>().is_ok())
}
