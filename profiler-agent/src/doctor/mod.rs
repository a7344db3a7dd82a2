//! What works on a machine, what does not, and what to do about it. Reads below two roots only, so that tests can make
//! up any machine.

mod host;
pub(crate) mod kernel;
pub(crate) mod process;

use std::{fmt, path::Path};

use serde::Serialize;

/// Where `/proc` and `/sys` of the machine are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host<'a> {
    pub(crate) proc: &'a Path,
    pub(crate) sys: &'a Path,
}

/// How it stands with one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// As it should be.
    Yes,
    /// Something is lost without.
    Partly,
    /// The agent cannot profile.
    No,
    /// Neither good nor bad.
    Info,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// What was looked at.
    what: String,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do about it.
    advice: Option<String>,
}

impl Finding {
    fn new(what: &str, verdict: Verdict, found: impl Into<String>) -> Self {
        Self { what: what.to_owned(), verdict, found: found.into(), advice: None }
    }

    fn yes(what: &str, found: impl Into<String>) -> Self {
        Self::new(what, Verdict::Yes, found)
    }

    fn info(what: &str, found: impl Into<String>) -> Self {
        Self::new(what, Verdict::Info, found)
    }

    fn partly(what: &str, found: impl Into<String>, advice: &str) -> Self {
        Self { advice: Some(advice.to_owned()), ..Self::new(what, Verdict::Partly, found) }
    }

    fn no(what: &str, found: impl Into<String>, advice: &str) -> Self {
        Self { advice: Some(advice.to_owned()), ..Self::new(what, Verdict::No, found) }
    }
}

/// All that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Report {
    machine: Vec<Finding>,
    /// What the agent can do here.
    works: Vec<Finding>,
}

impl Report {
    /// Whether the agent can take profiles on this machine.
    pub(crate) fn can_profile(&self) -> bool {
        self.machine.iter().chain(&self.works).all(|finding| finding.verdict != Verdict::No)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { machine, works } = self;
        machine.iter().try_for_each(|finding| finding.fmt(f))?;
        writeln!(f, "\nwhat works")?;
        works.iter().try_for_each(|finding| finding.fmt(f))
    }
}

/// `no     CAP_BPF: missing` and below it what to do.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, verdict, found, advice } = self;
        let verdict = match verdict {
            Verdict::Yes => "yes",
            Verdict::Partly => "partly",
            Verdict::No => "no",
            Verdict::Info => "",
        };
        writeln!(f, "{verdict:7}{what}: {found}")?;
        advice.iter().try_for_each(|advice| writeln!(f, "       -> {advice}"))
    }
}

/// Looks at everything.
pub(crate) fn examine(host: Host<'_>) -> Report {
    let machine = host::findings(host);
    let works = works(&machine);
    Report { machine, works }
}

/// What the agent does, and what it needs for that: names of findings.
const TOOLS: [(&str, &[&str]); 6] = [
    (
        "on-CPU profiles (cpu)",
        &["kernel", "type information", "CAP_BPF", "CAP_PERFMON", "perf_event_paranoid", "lockdown", "BPF"],
    ),
    (
        "whole user stacks of other users' processes",
        &["CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "pid namespace"],
    ),
    ("executables that are deleted or of other mount namespaces", &["CAP_CHECKPOINT_RESTORE"]),
    ("names of kernel functions", &["kernel symbols"]),
    ("labels of containers and units", &["cgroups", "pid namespace"]),
    ("heap, off-CPU and lock profiles", &["not built in"]),
];

/// A tool works as far as the worst thing that it needs.
fn works(machine: &[Finding]) -> Vec<Finding> {
    let tool = |&(tool, needs): &(&str, &[&str])| {
        if needs == ["not built in"] {
            return Finding::info(tool, "this version does not take them");
        }
        let needed = machine.iter().filter(|finding| needs.contains(&finding.what.as_str()));
        let lacking: Vec<_> =
            needed.filter(|finding| matches!(finding.verdict, Verdict::No | Verdict::Partly)).collect();
        let names: Vec<_> = lacking.iter().map(|finding| finding.what.as_str()).collect();
        let found = format!("for want of: {}", names.join(", "));
        match lacking.iter().any(|finding| finding.verdict == Verdict::No) {
            _ if lacking.is_empty() => Finding::yes(tool, "works"),
            true => Finding::no(tool, found, "see above"),
            false => Finding::partly(tool, found, "see above"),
        }
    };
    TOOLS.iter().map(tool).collect()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::PathBuf};

    use super::*;

    /// A machine of files.
    struct Machine {
        directory: tempfile::TempDir,
    }

    impl Machine {
        /// One where everything works, seen by root.
        fn good() -> Self {
            let machine = Self { directory: tempfile::tempdir().expect("a temporary directory") };
            machine
                .file("proc/sys/kernel/osrelease", "6.12.5-arch\n")
                .file("proc/sys/kernel/perf_event_paranoid", "2\n")
                .file("proc/sys/kernel/kptr_restrict", "1\n")
                .file("proc/sys/kernel/unprivileged_bpf_disabled", "2\n")
                .file("proc/sys/net/core/bpf_jit_enable", "1\n")
                .file("proc/self/status", "Name:\tx\nCapEff:\t000001ffffffffff\n")
                .file(
                    "proc/self/limits",
                    "Max locked memory         8388608              8388608              bytes\n",
                )
                .file("proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
                .file("proc/kallsyms", "0000000000000000 A fixed_percpu_data\nffffffff81000000 T _text\n")
                .file("proc/modules", "")
                .file("sys/kernel/btf/vmlinux", "BTF")
                .file("sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
                .file("sys/kernel/tracing/events/enable", "0\n")
                .file("sys/bus/event_source/devices/kprobe/type", "8\n")
                .link("proc/self/ns/pid", "pid:[4026531836]")
                .link("proc/71/exe", "/usr/lib/jvm/bin/java")
                .link("proc/72/exe", "/usr/bin/python3.12");
            machine
        }

        fn path(&self, name: &str) -> PathBuf {
            let path = self.directory.path().join(name);
            fs::create_dir_all(path.parent().expect("a file in a directory")).expect("create");
            path
        }

        fn file(&self, name: &str, text: &str) -> &Self {
            fs::write(self.path(name), text).expect("write");
            self
        }

        fn link(&self, name: &str, target: &str) -> &Self {
            let path = self.path(name);
            // There may be none yet.
            let _ = fs::remove_file(&path);
            symlink(target, path).expect("link");
            self
        }

        fn without(&self, name: &str) -> &Self {
            fs::remove_file(self.path(name)).expect("remove");
            self
        }

        fn examine(&self) -> Report {
            let (proc, sys) = (self.directory.path().join("proc"), self.directory.path().join("sys"));
            examine(Host { proc: &proc, sys: &sys })
        }
    }

    /// Where one thing is not as it should be, this is said of it and of what needs it.
    #[track_caller]
    fn check(change: impl FnOnce(&Machine) -> &Machine, what: &str, verdict: Verdict, can_profile: bool) {
        let machine = Machine::good();
        let report = change(&machine).examine();
        let finding = report.machine.iter().find(|finding| finding.what == what).expect("it was looked at");
        assert_eq!(finding.verdict, verdict, "{finding}");
        assert_eq!(finding.advice.is_some(), matches!(verdict, Verdict::No | Verdict::Partly), "{finding}");
        assert_eq!(report.can_profile(), can_profile, "{report}");
    }

    #[test]
    fn the_report_of_a_good_machine_is_as_designed() {
        insta::assert_snapshot!("good", Machine::good().examine().to_string());
    }

    #[test]
    fn the_report_of_a_bad_machine_says_what_to_do() {
        let machine = Machine::good();
        machine
            .file("proc/sys/kernel/osrelease", "6.2.0-1\n")
            .file("proc/self/status", "CapEff:\t00000000a80425fb\n")
            .file("proc/kallsyms", "0000000000000000 T _text\n")
            .file("proc/self/mounts", "")
            .file("sys/kernel/security/lockdown", "none integrity [confidentiality]\n")
            .file("sys/module/apparmor/parameters/enabled", "Y\n")
            .file("proc/self/attr/current", "docker-default (enforce)\n")
            .link("proc/self/ns/pid", "pid:[4026532201]")
            .without("sys/kernel/btf/vmlinux");
        insta::assert_snapshot!("bad", machine.examine().to_string());
    }

    #[test]
    fn each_lack_has_its_verdict() {
        let capabilities = |mask: &str| format!("CapEff:\t{mask}\n");
        let without_bpf = capabilities("0000017fffffffff");
        let without_ptrace = capabilities("000001fffff7ffff");
        check(|machine| machine, "kernel", Verdict::Yes, true);
        check(
            |machine| machine.file("proc/self/status", &without_ptrace),
            "CAP_SYS_PTRACE",
            Verdict::Partly,
            true,
        );
        // CAP_SYS_ADMIN stands for it.
        check(|machine| machine.file("proc/self/status", &without_bpf), "CAP_BPF", Verdict::Yes, true);
        let without_both = capabilities("0000017fffdfffff");
        check(|machine| machine.file("proc/self/status", &without_both), "CAP_BPF", Verdict::No, false);
        // What Debian begins with matters to who has CAP_PERFMON and not CAP_SYS_ADMIN.
        let paranoid = ("proc/sys/kernel/perf_event_paranoid", "3\n");
        let without_admin = capabilities("000001ffffdfffff");
        check(|machine| machine.file(paranoid.0, paranoid.1), "perf_event_paranoid", Verdict::Info, true);
        check(
            |machine| machine.file(paranoid.0, paranoid.1).file("proc/self/status", &without_admin),
            "perf_event_paranoid",
            Verdict::Partly,
            true,
        );
        check(|machine| machine.without("proc/modules"), "kernel symbols", Verdict::Yes, true);
        check(|machine| machine.without("proc/kallsyms"), "kernel symbols", Verdict::Partly, true);
        check(|machine| machine.without("sys/kernel/btf/vmlinux"), "type information", Verdict::No, false);
        check(|machine| machine.without("sys/kernel/security/lockdown"), "lockdown", Verdict::Yes, true);
        check(|machine| machine.without("sys/kernel/tracing/events/enable"), "tracefs", Verdict::Info, true);
        let interpreter = ("proc/sys/net/core/bpf_jit_enable", "0\n");
        check(|machine| machine.file(interpreter.0, interpreter.1), "BPF", Verdict::Partly, true);
        check(|machine| machine.file("proc/sys/kernel/osrelease", "5.4.0\n"), "kernel", Verdict::No, false);
        check(|machine| machine.link("proc/self/ns/pid", "pid:[7]"), "pid namespace", Verdict::No, false);
    }

    #[test]
    fn json_names_each_finding() {
        let json = serde_json::to_value(Machine::good().examine()).expect("JSON");
        assert_eq!(json["machine"][0]["what"], "kernel");
        assert_eq!(json["machine"][0]["verdict"], "yes");
        assert_eq!(json["works"][0]["verdict"], "yes");
    }
}
