//! Whose samples a recording takes.

use std::{collections::BTreeSet, fmt, fs, path::Path};

use anyhow::{Context as _, bail};

use super::Arguments;
use crate::label::owner;

/// Digits of a container id that are enough to mean it.
const ID_DIGITS_MIN: usize = 4;

/// Processes to record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// All of them.
    Everything,
    /// These, and what they start from then on.
    Pids(Vec<u32>),
    /// All in these cgroups and below: paths as `/proc/PID/cgroup` has them.
    Cgroups(BTreeSet<String>),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everything => f.write_str("this machine"),
            Self::Pids(pids) => {
                let pids: Vec<_> = pids.iter().map(u32::to_string).collect();
                write!(f, "process {}", pids.join(", "))
            }
            Self::Cgroups(paths) => {
                let paths: Vec<_> = paths.iter().map(String::as_str).collect();
                write!(f, "cgroup {}", paths.join(", "))
            }
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
            return container_cgroups(proc_root, container).map(Self::Cgroups);
        }
        if let Some(path) = &arguments.cgroup {
            return Ok(Self::Cgroups(BTreeSet::from([cgroup_path(path)?])));
        }
        if arguments.pid.is_empty() {
            return Ok(Self::Everything);
        }
        for pid in &arguments.pid {
            check_process(proc_root, *pid)?;
        }
        Ok(Self::Pids(arguments.pid.clone()))
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
    let below = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].iter().find_map(|root| given.strip_prefix(root));
    let path = format!("/{}", below.unwrap_or(given).trim_matches('/'));
    let exists = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup", "/sys/fs/cgroup/systemd"]
        .iter()
        .any(|root| Path::new(&format!("{root}{path}")).is_dir());
    if !exists {
        bail!("cgroup {given}: no such directory below /sys/fs/cgroup");
    }
    Ok(path)
}

/// The cgroups of the container whose id begins so, or whose name it is.
fn container_cgroups(proc_root: &Path, container: &str) -> anyhow::Result<BTreeSet<String>> {
    let mut found: BTreeSet<(String, String)> = BTreeSet::new();
    for entry in fs::read_dir(proc_root).context("list processes")?.flatten() {
        let is_process = entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit());
        // A process that ends meanwhile is in no container.
        let cgroup = fs::read_to_string(entry.path().join("cgroup"));
        if let (true, Ok(cgroup)) = (is_process, cgroup)
            && let Some(id) = owner(&cgroup).container_id
            && (id == container || (container.len() >= ID_DIGITS_MIN && id.starts_with(container)))
        {
            found.extend(container_path(&cgroup, &id).map(|path| (id, path)));
        }
    }
    let ids: BTreeSet<_> = found.iter().map(|(id, _)| id.as_str()).collect();
    match ids.len() {
        0 => bail!(
            "container {container}: no running process belongs to it (give its name, or 4 digits of its id)"
        ),
        1 => Ok(found.into_iter().map(|(_, path)| path).collect()),
        _ => bail!(
            "container {container}: begins the ids of {}",
            ids.into_iter().collect::<Vec<_>>().join(", ")
        ),
    }
}

/// The path of the container itself, which may have cgroups of its own below.
fn container_path(cgroup: &str, id: &str) -> Option<String> {
    let paths = cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let path = paths.filter(|path| path.contains(id)).max_by_key(|path| path.len())?;
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
        let found = container_cgroups(root.path(), "3f1c").expect("one container");
        assert_eq!(found, BTreeSet::from([format!("/kubepods.slice/cri-containerd-{ID}.scope")]));
    }

    #[test]
    fn a_container_that_is_not_there_and_one_that_is_not_clear_are_errors() {
        let other = ID.replace("3f1c0", "3f1c1");
        let root = proc_with(&[(1, format!("0::/docker/{ID}\n")), (2, format!("0::/docker/{other}\n"))]);
        let message = |container| container_cgroups(root.path(), container).expect_err("refused").to_string();
        assert!(message("beef").contains("no running process"), "{}", message("beef"));
        assert!(message("3f1c").contains("begins the ids of"), "{}", message("3f1c"));
        assert!(message("3").contains("no running process"), "{}", message("3"));
        assert_eq!(container_cgroups(root.path(), &ID[..6]).expect("one").len(), 1);
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
