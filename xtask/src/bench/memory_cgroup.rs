//! A cgroup whose memory is limited, of v1 or v2, for a profiler under measurement.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// Goes with all that was in it, when that has ended.
pub(super) struct MemoryCgroup {
    directory: PathBuf,
    is_v2: bool,
}

impl MemoryCgroup {
    pub(super) fn create(bytes: u64) -> Result<Self> {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let is_v2 = !v1.exists();
        let root = if is_v2 { Path::new("/sys/fs/cgroup") } else { v1 };
        if is_v2 {
            fs::write(root.join("cgroup.subtree_control"), "+memory").context("let cgroups limit memory")?;
        }
        let directory = root.join(format!("profiler-bench-{}", std::process::id()));
        fs::create_dir(&directory).with_context(|| format!("create {}", directory.display()))?;
        let cgroup = Self { directory, is_v2 };
        let limit = if is_v2 { "memory.max" } else { "memory.limit_in_bytes" };
        fs::write(cgroup.directory.join(limit), bytes.to_string()).context("limit memory")?;
        Ok(cgroup)
    }

    /// Where a process writes its id to be in it.
    pub(super) fn procs(&self) -> PathBuf {
        self.directory.join("cgroup.procs")
    }

    /// Most bytes at a time so far, BPF maps and page cache included.
    pub(super) fn peak_bytes(&self) -> Result<u64> {
        let file = if self.is_v2 { "memory.peak" } else { "memory.max_usage_in_bytes" };
        self.read(file)?.trim().parse().with_context(|| format!("parse {file}"))
    }

    /// Processes killed for lack of memory.
    pub(super) fn killed(&self) -> Result<u64> {
        let file = if self.is_v2 { "memory.events" } else { "memory.oom_control" };
        let text = self.read(file)?;
        let killed = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
        killed.with_context(|| format!("{file} has no oom_kill"))
    }

    fn read(&self, file: &str) -> Result<String> {
        fs::read_to_string(self.directory.join(file)).with_context(|| format!("read {file} of the cgroup"))
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.directory) {
            eprintln!("{} stays behind: {error}", self.directory.display());
        }
    }
}
