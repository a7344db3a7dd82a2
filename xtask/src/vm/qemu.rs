//! One machine, from its boot to its end, and what it said on its serial line.

use std::{path::Path, process::Command};

use anyhow::Result;

use crate::{cargo_test, command, tally::Tally};

/// Of real time, for a machine on a busy host.
const PATIENCE_SECONDS: &str = "7200";

/// Nanoseconds of the machine's time for one instruction, as a power of 2: 250 million instructions a second, which is
/// about what emulation does on a quiet host.
const NS_PER_INSTRUCTION_LOG2: u32 = 2;

/// All that can be emulated, but for the fast copying of bytes: emulated, each byte is an instruction.
const CPU: &str = "max,-erms,-fsrm";

/// The root file system is in memory as well.
const MEMORY_MIB: u32 = 4096;

/// What is booted.
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Path,
    /// Its root file system.
    pub(super) archive: &'a Path,
    /// Version of the control groups that it mounts.
    pub(super) cgroup: &'a str,
    /// They take turns: together they execute as many instructions as one alone.
    pub(super) processors: u32,
}

/// Boots a machine and runs test files in it; gives what came of each that ended before the machine did.
pub(super) fn run(machine: &Machine<'_>, tests: &[&str]) -> Result<Vec<(String, Tally)>> {
    let &Machine { kernel, archive, cgroup, processors } = machine;
    let mut console = Console::default();
    let parameters =
        format!("console=ttyS0 quiet panic=-1 profiler.cgroup={cgroup} profiler.tests={}", tests.join(","));
    let mut qemu = Command::new("timeout");
    qemu.args(["--foreground", "--kill-after=5", PATIENCE_SECONDS, "qemu-system-x86_64"])
        .args(["-accel", "tcg", "-cpu", CPU, "-smp", &processors.to_string()])
        .args(["-icount", &format!("shift={NS_PER_INSTRUCTION_LOG2},sleep=off")])
        // Its wall clock too, or certificates and windows would run by the host's.
        .args(["-rtc", "clock=vm"])
        .args(["-m", &format!("{MEMORY_MIB}M")])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(archive)
        .args(["-append", &parameters])
        .stdin(std::process::Stdio::null());
    let succeeded = command::run_reading(&mut qemu, |line| console.read(line.trim_end()))?;
    if !succeeded {
        println!("FAILED: the machine did not end within {PATIENCE_SECONDS} s, or not by itself");
    }
    Ok(console.ran)
}

/// The results among the lines of a machine.
#[derive(Default)]
struct Console {
    current: String,
    tally: Tally,
    ran: Vec<(String, Tally)>,
}

impl Console {
    /// Reads a line: `== begin NAME`, `== end NAME CODE` of init.sh; those of tests between them.
    fn read(&mut self, line: &str) {
        if let Some(name) = line.strip_prefix("== begin ") {
            name.clone_into(&mut self.current);
            self.tally = Tally::default();
        } else if let Some(end) = line.strip_prefix("== end ") {
            self.end(end);
        } else if let Some(result) = cargo_test::parse_result(line) {
            self.tally += result;
        } else if is_skip(line) {
            self.tally += Tally::SKIPPED;
        }
    }

    fn end(&mut self, end: &str) {
        let succeeded = end.strip_prefix(self.current.as_str()) == Some(" 0");
        let mut tally = self.tally;
        // It broke off, or was killed.
        if !succeeded && tally.failed == 0 {
            tally += Tally::FAILED;
        }
        self.ran.push((std::mem::take(&mut self.current), tally));
    }
}

/// Whether a test says what it leaves out: in a line of its own, or behind its name.
fn is_skip(line: &str) -> bool {
    line.starts_with("SKIP ") || line.starts_with("test ") && line.contains(" ... SKIP ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(lines: &str, expect: &[(&str, Tally)]) {
        let mut console = Console::default();
        lines.lines().for_each(|line| console.read(line));
        let ran: Vec<_> = console.ran.iter().map(|(name, tally)| (name.as_str(), *tally)).collect();
        assert_eq!(ran, expect);
    }

    #[test]
    fn tests_and_what_they_leave_out_are_counted() {
        check(
            "== begin unwind\ntest stacks ... SKIP node: not installed\nSKIP java: not installed\nok\n\
             test result: ok. 1 passed; 0 failed; 0 ignored\n== end unwind 0\n",
            &[("unwind", Tally { passed: 1, failed: 0, skipped: 2 })],
        );
    }

    #[test]
    fn a_test_file_without_a_result_has_failed() {
        check("== begin names\n== end names 139\n", &[("names", Tally::FAILED)]);
        check("== begin names\nKernel panic\n", &[]);
    }
}
