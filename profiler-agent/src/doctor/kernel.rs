//! Which kernel it is, and whether it is known to break when it is profiled.

use std::{fmt, fs, path::Path};

/// Before this, what the programs are made of is not there.
const OLDEST: Version = Version { major: 5, minor: 10, patch: 0 };

/// A version of Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version {
    major: u32,
    minor: u32,
    patch: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { major, minor, patch } = self;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// Kernels `first..fixed` that break.
#[derive(Debug)]
struct Flaw {
    first: Version,
    fixed: Version,
    what: &'static str,
}

const fn version(major: u32, minor: u32, patch: u32) -> Version {
    Version { major, minor, patch }
}

const fn user_reads(first: Version, fixed: Version) -> Flaw {
    let what = "reading user memory in a perf interrupt can lock up the whole machine";
    Flaw { first, fixed, what }
}

/// With hardened user copies, bpf_probe_read_user takes the lock of the vmalloc areas, which the interrupted code may
/// hold. Fixed by d319f344561d ("mm: Fix copy_from_user_nofault().") in 6.4, 6.3.10 and 6.1.36. Source: mm/maccess.c of
/// these; bugs.debian.org/1033398; parca-dev/parca-agent issue 1675.
const FLAWS: [Flaw; 2] =
    [user_reads(version(5, 19, 0), version(6, 1, 36)), user_reads(version(6, 2, 0), version(6, 3, 10))];

/// What is wrong with a kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum KernelError {
    #[error("Linux {0}: {OLDEST} or later is needed")]
    TooOld(Version),
    #[error(
        "Linux {version}: {what}, until {fixed}; install a newer kernel, or say --allow-kernel if the fix is in yours"
    )]
    Flawed { version: Version, fixed: Version, what: &'static str },
}

/// An error when the agent had better not run on this kernel. A kernel whose version cannot be read is taken to be good.
pub(crate) fn check(proc_root: &Path, allow: bool) -> Result<(), KernelError> {
    match running(proc_root) {
        Some(version) if !allow => judge(version),
        _ => Ok(()),
    }
}

/// Whether a version is good.
pub(super) fn judge(version: Version) -> Result<(), KernelError> {
    if version < OLDEST {
        return Err(KernelError::TooOld(version));
    }
    match FLAWS.iter().find(|flaw| (flaw.first..flaw.fixed).contains(&version)) {
        Some(&Flaw { first: _, fixed, what }) => Err(KernelError::Flawed { version, fixed, what }),
        None => Ok(()),
    }
}

/// The version that the running kernel was made from. Distributions that number their builds themselves say that one
/// elsewhere: Debian's 6.1.0-44 has `Debian 6.1.170-3` in its version, Ubuntu's 6.8.0-31 ends its signature with 6.8.1.
pub(super) fn running(proc_root: &Path) -> Option<Version> {
    let read = |name: &str| fs::read_to_string(proc_root.join(name)).unwrap_or_default();
    let debian = read("sys/kernel/version");
    let debian = debian.split_once("Debian ").map_or("", |(_, version)| version);
    let ubuntu = read("version_signature");
    let ubuntu = ubuntu.split_whitespace().last().unwrap_or_default();
    let release = read("sys/kernel/osrelease");
    [debian, ubuntu, &release].into_iter().find_map(parse)
}

/// `6.1.170-3` -> 6.1.170, `6.18-rc1` -> 6.18.0.
fn parse(text: &str) -> Option<Version> {
    let end = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(text.len());
    let mut numbers = text.get(..end)?.split('.').map(|number| number.parse::<u32>());
    let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
    Some(Version { major, minor, patch })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_good(text: &str, is_good: bool) {
        let version = parse(text).expect("a version");
        assert_eq!(judge(version).is_ok(), is_good, "{version}");
    }

    #[test]
    fn kernels_that_lock_up_are_known_by_version() {
        for good in ["5.10.0", "5.18.19", "6.1.36", "6.1.170", "6.3.10", "6.4", "6.18.44"] {
            check_good(good, true);
        }
        for bad in ["5.4.300", "5.19.0", "6.0.19", "6.1.0", "6.1.35", "6.2.16", "6.3.9"] {
            check_good(bad, false);
        }
    }

    #[test]
    fn what_distributions_call_a_kernel_is_not_its_version() {
        let check = |files: &[(&str, &str)], expect: &str| {
            let root = tempfile::tempdir().expect("a temporary directory");
            fs::create_dir_all(root.path().join("sys/kernel")).expect("create");
            for (name, text) in files {
                fs::write(root.path().join(name), text).expect("write");
            }
            assert_eq!(running(root.path()).map(|version| version.to_string()), Some(expect.to_owned()));
        };
        let vanilla = ("sys/kernel/version", "#1 SMP PREEMPT_DYNAMIC @0\n");
        check(&[("sys/kernel/osrelease", "6.18.44-fc\n"), vanilla], "6.18.44");
        let debian = ("sys/kernel/version", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.170-3 (2026-04-09)\n");
        check(&[("sys/kernel/osrelease", "6.1.0-44-amd64\n"), debian], "6.1.170");
        let ubuntu = ("version_signature", "Ubuntu 6.2.0-39.40-generic 6.2.16\n");
        check(&[("sys/kernel/osrelease", "6.2.0-39-generic\n"), vanilla, ubuntu], "6.2.16");
    }

    #[test]
    fn a_bad_kernel_is_refused_by_name_unless_it_is_allowed() {
        let root = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir_all(root.path().join("sys/kernel")).expect("create");
        fs::write(root.path().join("sys/kernel/osrelease"), "6.0.12-generic\n").expect("write");
        let error = super::check(root.path(), false).expect_err("refused").to_string();
        assert!(error.contains("Linux 6.0.12") && error.contains("--allow-kernel"), "{error}");
        super::check(root.path(), true).expect("allowed");
    }
}
