//! Whose samples a recording takes.

use std::{collections::BTreeSet, fmt, fs, path::Path};

use anyhow::{Context as _, bail};

use super::Arguments;
use crate::{label::owner, process::pids, sys::cgroup::WholeV2, targets::Targets};

/// Digits of a container id that are enough to mean it.
const ID_DIGITS_MIN: usize = 4;

/// Processes to record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// All of them.
    Everything,
    /// These, and what they start from then on.
    Processes(Vec<u32>),
    /// A process that is about to become the command, and what that starts.
    Command(u32),
    /// All in this cgroup of the v2 hierarchy and below: its path as `/proc/PID/cgroup` has it.
    Cgroup(String),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everything => f.write_str("this machine"),
            Self::Processes(pids) => {
                let pids: Vec<_> = pids.iter().map(u32::to_string).collect();
                write!(f, "process {}", pids.join(", "))
            }
            Self::Command(pid) => write!(f, "process {pid}"),
            Self::Cgroup(path) => write!(f, "cgroup {path}"),
        }
    }
}

impl Target {
    /// What the arguments mean now.
    ///
    /// # Errors
    /// For a process, container or cgroup that is not there.
    pub(super) fn resolve(arguments: &Arguments) -> anyhow::Result<Self> {
        let proc_root = Path::new("/proc");
        if let Some(container) = &arguments.container {
            return find_container(proc_root, container);
        }
        if let Some(path) = &arguments.cgroup {
            return cgroup_path(path).map(Self::Cgroup);
        }
        if arguments.pid.is_empty() {
            return Ok(Self::Everything);
        }
        for pid in &arguments.pid {
            check_process(proc_root, *pid)?;
        }
        Ok(Self::Processes(arguments.pid.clone()))
    }

    /// As the kernel side is told.
    pub(super) fn to_targets(&self) -> Targets {
        let list = match self {
            Self::Processes(pids) => return Targets::family(pids),
            Self::Command(pid) => return Targets::family(&[*pid]),
            Self::Everything => Vec::new(),
            Self::Cgroup(path) => vec![crate::targets::Target {
                cgroup: Some(path.into()),
                is_wanted: true,
                ..crate::targets::Target::default()
            }],
        };
        Targets::new(list, matches!(self, Self::Everything)).expect("one target fits")
    }
}

fn check_process(proc_root: &Path, pid: u32) -> anyhow::Result<()> {
    let status = fs::read_to_string(proc_root.join(format!("{pid}/status")))
        .with_context(|| format!("find process {pid}"))?;
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:")).map(str::trim);
    match process {
        Some(process) if process != pid.to_string() => {
            bail!("{pid} is a thread of process {process}: record that")
        }
        _ => Ok(()),
    }
}

/// `/sys/fs/cgroup/unified/a/b` and `a/b` -> `/a/b`.
fn cgroup_path(given: &str) -> anyhow::Result<String> {
    let Some(hierarchy) = WholeV2::find("/proc".as_ref()) else {
        bail!("cgroup {given}: no cgroup v2 hierarchy is mounted; record its processes with -p");
    };
    let root = hierarchy.path();
    let below = Path::new(given).strip_prefix(root).unwrap_or(Path::new(given));
    let path = format!("/{}", below.to_string_lossy().trim_matches('/'));
    if !root.join(path.trim_start_matches('/')).is_dir() {
        bail!("cgroup {given}: no such directory below {}", root.display());
    }
    Ok(path)
}

/// A process of a container.
struct Member {
    pid: u32,
    id: String,
    /// The container's own cgroup in the v2 hierarchy, where it has one.
    cgroup: Option<String>,
}

/// The container whose id begins so, or whose name it is: its cgroup, or else its processes.
fn find_container(proc_root: &Path, container: &str) -> anyhow::Result<Target> {
    let mut members = Vec::new();
    for pid in pids(proc_root).context("list processes")? {
        // A process that ends meanwhile is in no container.
        let Ok(cgroup) = fs::read_to_string(proc_root.join(format!("{pid}/cgroup"))) else { continue };
        if let Some(id) = owner(&cgroup).container_id
            && (id == container || (container.len() >= ID_DIGITS_MIN && id.starts_with(container)))
        {
            members.push(Member { pid, cgroup: container_cgroup(&cgroup, &id), id });
        }
    }
    let ids: BTreeSet<_> = members.iter().map(|member| member.id.as_str()).collect();
    match ids.len() {
        0 => bail!("container {container}: no process of it runs (give its name, or 4 digits of its id)"),
        1 => {}
        _ => bail!("container {container}: begins the ids of {}", Vec::from_iter(ids).join(", ")),
    }
    let cgroup = members.iter().find_map(|member| member.cgroup.clone());
    Ok(cgroup.map_or_else(|| Target::Processes(members.iter().map(|m| m.pid).collect()), Target::Cgroup))
}

/// The path of the container itself, which may have cgroups of its own below.
fn container_cgroup(cgroup: &str, id: &str) -> Option<String> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    let mut end = path.find(id)? + id.len();
    end += path.get(end..)?.find('/').unwrap_or(path.len() - end);
    path.get(..end).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "3f1c0a9c4ad1d8e0d7d8c9f2b5a6e4d3c2b1a09f8e7d6c5b4a39281706f5e4d3";

    fn proc_with(cgroups: &[(u32, String)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for (pid, cgroup) in cgroups {
            let dir = root.path().join(pid.to_string());
            fs::create_dir(&dir).expect("a directory");
            fs::write(dir.join("cgroup"), cgroup).expect("a file");
        }
        root
    }

    #[test]
    fn a_container_is_found_by_the_beginning_of_its_id() {
        let inside = format!("0::/kubepods.slice/cri-containerd-{ID}.scope/init\n");
        let root = proc_with(&[(1, "0::/init.scope\n".to_owned()), (20, inside)]);
        let found = find_container(root.path(), "3f1c").expect("one container");
        assert_eq!(found, Target::Cgroup(format!("/kubepods.slice/cri-containerd-{ID}.scope")));
    }

    #[test]
    fn without_a_v2_cgroup_of_its_own_a_container_is_its_processes() {
        let inside = format!("4:memory:/docker/{ID}\n0::/system.slice/docker.service\n");
        let root = proc_with(&[(1, "0::/init.scope\n".to_owned()), (20, inside)]);
        let found = find_container(root.path(), "3f1c").expect("one container");
        assert_eq!(found, Target::Processes(vec![20]));
    }

    #[test]
    fn a_container_that_is_not_there_and_one_that_is_not_clear_are_errors() {
        let other = ID.replace("3f1c0", "3f1c1");
        let root = proc_with(&[(1, format!("0::/docker/{ID}\n")), (2, format!("0::/docker/{other}\n"))]);
        let message = |container| find_container(root.path(), container).expect_err("refused").to_string();
        assert!(message("beef").contains("no process of it runs"), "{}", message("beef"));
        assert!(message("3f1c").contains("begins the ids of"), "{}", message("3f1c"));
        assert!(message("3").contains("no process of it runs"), "{}", message("3"));
        find_container(root.path(), &ID[..6]).expect("one");
    }

    #[test]
    fn a_thread_and_a_process_that_is_gone_are_refused_by_name() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("12");
        fs::create_dir(&dir).expect("a directory");
        fs::write(dir.join("status"), "Name:\tx\nTgid:\t11\nPid:\t12\n").expect("a file");
        let thread = check_process(root.path(), 12).expect_err("a thread").to_string();
        assert_eq!(thread, "12 is a thread of process 11: record that");
        assert_eq!(check_process(root.path(), 13).expect_err("gone").to_string(), "find process 13");
    }
}
