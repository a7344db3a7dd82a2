//! Which CPUs there are.

use std::{fs, io, path::Path};

/// More CPUs than any machine has that this was built for; a list that names more is refused.
const CPUS_MAX: u32 = 16_384;

/// The CPUs that are online now, ascending. Source: Documentation/ABI/testing/sysfs-devices-system-cpu, `online`.
pub(crate) fn online(sys_root: &Path) -> io::Result<Vec<u32>> {
    let path = sys_root.join("devices/system/cpu/online");
    let text = fs::read_to_string(&path)?;
    parse_list(text.trim())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("CPU list {text:?}")))
}

/// Parses `0-3,8,10-11`.
fn parse_list(text: &str) -> Option<Vec<u32>> {
    let mut cpus = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= CPUS_MAX {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expect: Option<&[u32]>) {
        assert_eq!(parse_list(text).as_deref(), expect, "{text:?}");
    }

    #[test]
    fn cpu_lists_are_read_as_the_kernel_writes_them() {
        check("0", Some(&[0]));
        check("0-3", Some(&[0, 1, 2, 3]));
        check("0-1,4,6-7", Some(&[0, 1, 4, 6, 7]));
        check("", Some(&[]));
    }

    #[test]
    fn other_text_is_refused() {
        check("3-1", None);
        check("a", None);
        check("0-4294967295", None);
    }

    #[test]
    fn this_machine_has_a_cpu_online() {
        assert!(!online(Path::new("/sys")).expect("readable").is_empty());
    }
}
