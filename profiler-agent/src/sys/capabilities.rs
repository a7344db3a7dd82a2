//! What this process may do.

use std::{fmt, fs, io};

/// A capability the agent uses, with its bit. Source: include/uapi/linux/capability.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capability {
    /// Reading files of other users: executables in their roots.
    DacReadSearch = 2,
    /// `/proc/<pid>/maps`, `root` and `map_files` of other users.
    SysPtrace = 19,
    /// Stands for Bpf and Perfmon on kernels before 5.8, and opens map_files before 5.9.
    SysAdmin = 21,
    /// Raising the limit of locked memory, which maps count against before 5.11.
    SysResource = 24,
    /// Addresses of kernel symbols.
    Syslog = 34,
    /// perf events on all processes and tracing programs.
    Perfmon = 38,
    /// Loading programs and making maps.
    Bpf = 39,
    /// `/proc/<pid>/map_files`.
    CheckpointRestore = 40,
}

impl Capability {
    /// Those that make a difference, the needed ones first.
    pub(crate) const USED: [Self; 7] = [
        Self::Bpf,
        Self::Perfmon,
        Self::SysPtrace,
        Self::DacReadSearch,
        Self::CheckpointRestore,
        Self::Syslog,
        Self::SysResource,
    ];

    /// Whether nothing can be sampled without.
    pub(crate) fn is_needed(self) -> bool {
        matches!(self, Self::Bpf | Self::Perfmon)
    }

    /// What it is for.
    pub(crate) fn gives(self) -> &'static str {
        match self {
            Self::Bpf => "loading programs and maps",
            Self::Perfmon => "sampling all processes",
            Self::SysPtrace => "mappings and executables of other users' processes",
            Self::DacReadSearch => "executables in directories that others may not enter",
            Self::CheckpointRestore => "executables that are deleted or of other mount namespaces",
            Self::Syslog => "names of kernel functions",
            Self::SysResource => "more locked memory, before Linux 5.11",
            Self::SysAdmin => "all of them on old kernels",
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DacReadSearch => "CAP_DAC_READ_SEARCH",
            Self::SysPtrace => "CAP_SYS_PTRACE",
            Self::SysAdmin => "CAP_SYS_ADMIN",
            Self::SysResource => "CAP_SYS_RESOURCE",
            Self::Syslog => "CAP_SYSLOG",
            Self::Perfmon => "CAP_PERFMON",
            Self::Bpf => "CAP_BPF",
            Self::CheckpointRestore => "CAP_CHECKPOINT_RESTORE",
        })
    }
}

/// The capabilities that are missing for sampling every process. Source: proc_pid_status(5), CapEff.
pub(crate) fn missing() -> io::Result<Vec<Capability>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let effective = effective(&status)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no CapEff in /proc/self/status"))?;
    Ok(missing_from(effective))
}

/// The mask of effective capabilities in `/proc/<pid>/status`.
pub(crate) fn effective(status: &str) -> Option<u64> {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

/// Those of [`Capability::USED`] that a mask does not have, nor CAP_SYS_ADMIN in their place.
pub(crate) fn missing_from(effective: u64) -> Vec<Capability> {
    let by_admin = |capability| {
        use Capability::{Bpf, CheckpointRestore, Perfmon};
        matches!(capability, Bpf | Perfmon | CheckpointRestore) && has(effective, Capability::SysAdmin)
    };
    let is_missing = |capability: &Capability| !has(effective, *capability) && !by_admin(*capability);
    Capability::USED.into_iter().filter(is_missing).collect()
}

/// Whether a mask has a capability.
pub(crate) fn has(effective: u64, capability: Capability) -> bool {
    effective & (1 << capability as u32) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_misses_nothing_and_a_user_everything() {
        assert_eq!(missing_from(u64::MAX), []);
        assert_eq!(missing_from(0), Capability::USED);
    }

    #[test]
    fn sys_admin_stands_for_what_was_split_off_it() {
        use Capability::{DacReadSearch, SysPtrace, SysResource, Syslog};
        assert_eq!(missing_from(1 << 21), [SysPtrace, DacReadSearch, Syslog, SysResource]);
    }

    #[test]
    fn the_mask_is_read_from_status() {
        assert_eq!(effective("Name:\tx\nCapEff:\t00000000a80425fb\n"), Some(0xa804_25fb));
        assert_eq!(effective("Name:\tx\n"), None);
    }
}
