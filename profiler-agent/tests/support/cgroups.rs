//! Cgroups of a test's own, in every hierarchy the machine has.

#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::support::{Program, testprogs};

/// How long killed processes may take to leave their cgroups.
const PATIENCE: Duration = Duration::from_secs(20);

/// A cgroup; at the end all that runs below it is killed, and it is removed with all below it.
pub(crate) struct Cgroups {
    /// Where the cgroup hierarchies are mounted: one on v2, one per controller on v1, both on hybrid hosts.
    hierarchies: Vec<PathBuf>,
    /// The hierarchies that systemd places units in: v2 and, where there is v1, its own.
    placement: Vec<PathBuf>,
    /// Name of the cgroup, directly below each root.
    name: String,
}

impl Cgroups {
    pub(crate) fn new() -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts of this process");
        let (mut hierarchies, mut placement) = (Vec::new(), Vec::new());
        for mount in mounts.lines() {
            let fields: Vec<_> = mount.split(' ').collect();
            let [_, at, kind @ ("cgroup" | "cgroup2"), options, ..] = fields[..] else { continue };
            hierarchies.push(PathBuf::from(at));
            if kind == "cgroup2" || options.split(',').any(|option| option == "name=systemd") {
                placement.push(PathBuf::from(at));
            }
        }
        assert!(!placement.is_empty(), "neither v2 nor systemd's cgroups are mounted:\n{mounts}");
        Self { hierarchies, placement, name: format!("profiler-test-{}", std::process::id()) }
    }

    /// The cgroup's path, as `/proc/<pid>/cgroup` shows it.
    pub(crate) fn path(&self) -> String {
        format!("/{}", self.name)
    }

    /// Starts a test program in a cgroup below this one. As systemd does it: what is started moves itself and then
    /// becomes the program, which is never anywhere else.
    pub(crate) fn start(&self, cgroup: &str, program: &str) -> Program {
        let program = testprogs().join(program);
        let script = format!("{} exec '{}'", self.moves(cgroup), program.display());
        Program::system("sh", &["-c", &script])
    }

    /// Shell commands that create a cgroup below this one and move the shell there.
    pub(crate) fn moves(&self, cgroup: &str) -> String {
        let move_to = |root: &PathBuf| {
            let directory = root.join(&self.name).join(cgroup);
            fs::create_dir_all(&directory).expect("a cgroup can be created");
            format!("echo $$ >'{}/cgroup.procs' &&", directory.display())
        };
        self.placement.iter().map(move_to).collect::<Vec<_>>().join(" ")
    }

    /// A cgroup below this one in the v2 hierarchy, or in systemd's where there is none.
    pub(crate) fn directory(&self, cgroup: &str) -> PathBuf {
        let is_v2 = |root: &&PathBuf| root.join("cgroup.controllers").exists();
        let root = self.placement.iter().find(is_v2).or(self.placement.first()).expect("there is one");
        let directory = root.join(&self.name).join(cgroup);
        fs::create_dir_all(&directory).expect("a cgroup can be created");
        directory
    }

    /// Shell commands that move the shell to a cgroup below this one in the v1
    /// hierarchy of one controller only.
    pub(crate) fn moves_in(&self, controller: &str, cgroup: &str) -> String {
        let is_its = |root: &&PathBuf| root.file_name().is_some_and(|name| name == controller);
        let root = self.hierarchies.iter().find(is_its).expect("the controller has a hierarchy");
        let directory = root.join(&self.name).join(cgroup);
        fs::create_dir_all(&directory).expect("a cgroup can be created");
        format!("echo $$ >'{}/cgroup.procs' &&", directory.display())
    }

    /// Kills all that runs below this cgroup, and removes it. Says what stays, if anything does.
    pub(crate) fn clear(&self) {
        let mut own: Vec<_> = self.hierarchies.iter().map(|root| root.join(&self.name)).collect();
        let end = Instant::now() + PATIENCE;
        loop {
            own.retain(|cgroup| !remove(cgroup));
            if own.is_empty() {
                return;
            }
            if Instant::now() > end {
                eprintln!("cgroups stay behind: {own:?}");
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Kills what runs in a cgroup and below, and removes what is empty. Whether all is gone.
fn remove(cgroup: &Path) -> bool {
    let below = fs::read_dir(cgroup).into_iter().flatten().flatten();
    for child in below.filter(|child| child.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove(&child.path());
    }
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    processes.lines().filter_map(|pid| pid.parse().ok()).for_each(kill);
    // Fails while there are children or processes, which the caller will see.
    let _ = fs::remove_dir(cgroup);
    !cgroup.exists()
}

fn kill(pid: i32) {
    assert!(pid > 0, "a cgroup lists processes of this pid namespace");
    // SAFETY: a signal to a process that was in the test's own cgroup a moment ago; failing is harmless.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}
