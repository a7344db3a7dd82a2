//! What this process may do.

use std::{fmt, fs, io};

/// A capability the agent needs, with its bit. Source: include/uapi/linux/capability.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capability {
    /// Reading files of other users: executables in their roots.
    DacReadSearch = 2,
    /// `/proc/<pid>/map_files` and `/proc/<pid>/root` of other users.
    SysPtrace = 19,
    /// Stands for Bpf and Perfmon on kernels before 5.8, and opens map_files before 5.9.
    SysAdmin = 21,
    /// perf events on all processes and tracing programs.
    Perfmon = 38,
    /// Loading programs and making maps.
    Bpf = 39,
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DacReadSearch => "CAP_DAC_READ_SEARCH",
            Self::SysPtrace => "CAP_SYS_PTRACE",
            Self::SysAdmin => "CAP_SYS_ADMIN",
            Self::Perfmon => "CAP_PERFMON",
            Self::Bpf => "CAP_BPF",
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

fn effective(status: &str) -> Option<u64> {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

fn missing_from(effective: u64) -> Vec<Capability> {
    let has = |capability: Capability| effective & (1 << capability as u32) != 0;
    let admin_covers =
        |capability| matches!(capability, Capability::Bpf | Capability::Perfmon) && has(Capability::SysAdmin);
    [Capability::Bpf, Capability::Perfmon, Capability::SysPtrace, Capability::DacReadSearch]
        .into_iter()
        .filter(|&capability| !has(capability) && !admin_covers(capability))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_misses_nothing_and_a_user_everything() {
        assert_eq!(missing_from(u64::MAX), []);
        assert_eq!(missing_from(0).len(), 4);
    }

    #[test]
    fn sys_admin_stands_for_bpf_and_perfmon() {
        assert_eq!(missing_from(1 << 21), [Capability::SysPtrace, Capability::DacReadSearch]);
    }

    #[test]
    fn the_mask_is_read_from_status() {
        assert_eq!(effective("Name:\tx\nCapEff:\t00000000a80425fb\n"), Some(0xa804_25fb));
        assert_eq!(effective("Name:\tx\n"), None);
    }
}
