//! Labels: which series a process belongs to, and what its samples carry.

mod cgroup;
mod names;

use std::{collections::BTreeMap, fmt, sync::Arc};

pub(crate) use cgroup::{Owner, owner};
pub(crate) use names::{CgroupNames, NameCounts};

/// Value of `exe` and `service_name` for kernel threads.
pub(crate) const KERNEL: &str = "[kernel]";

/// Digits of a container id shown as the container's name while no runtime has told a better one.
const SHORT_ID_DIGITS: usize = 12;

/// Labels that identify a profile, by name. Shared: a node has thousands of processes and hundreds of series.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SeriesLabels(Arc<BTreeMap<String, String>>);

impl SeriesLabels {
    /// Names and values, by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The value of a label.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

impl fmt::Debug for SeriesLabels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.0.iter()).finish()
    }
}

/// What is known of a process when its labels are made.
#[derive(Clone, Debug, Default)]
pub(crate) struct Subject<'a> {
    /// Path of its executable as it sees it; empty when it has none.
    pub(crate) exe: &'a str,
    /// It runs in the kernel only.
    pub(crate) is_kernel_thread: bool,
    /// Its name: stands in for the executable of a process that is gone before it could be looked at.
    pub(crate) comm: &'a str,
    /// Who runs in its cgroup.
    pub(crate) owner: Arc<Owner>,
}

/// Makes series labels for processes of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Labeler {
    /// Labels every series has: `node` and what the operator set.
    fixed: BTreeMap<String, String>,
}

impl Labeler {
    /// `fixed` labels win over found ones: the operator knows best.
    pub(crate) fn new(node: &str, fixed: &[(String, String)]) -> Self {
        let mut all = BTreeMap::from([("node".to_owned(), node.to_owned())]);
        all.extend(fixed.iter().cloned());
        Self { fixed: all }
    }

    /// The labels of a process.
    pub(crate) fn series(&self, subject: &Subject<'_>) -> SeriesLabels {
        let Subject { exe, is_kernel_thread, comm, owner } = subject;
        let exe = if *is_kernel_thread { KERNEL } else { base_name(exe, comm) };
        let container = owner.container_id.as_deref().map(short_name);
        let service = container.or(owner.unit.as_deref().map(trim_unit)).unwrap_or(exe);
        let found = [
            ("exe", Some(exe)),
            ("container_id", owner.container_id.as_deref()),
            ("container", container),
            ("unit", owner.unit.as_deref()),
            ("slice", owner.slice.as_deref()),
            ("service_name", Some(service)),
        ];
        let mut labels: BTreeMap<_, _> = found
            .into_iter()
            .filter_map(|(name, value)| {
                Some((name.to_owned(), value.filter(|value| !value.is_empty())?.to_owned()))
            })
            .collect();
        labels.extend(self.fixed.iter().map(|(name, value)| (name.clone(), value.clone())));
        SeriesLabels(Arc::new(labels))
    }
}

/// A container's name by what its cgroup tells: the first digits of its id, or the name that it has instead of one.
pub(crate) fn short_name(id: &str) -> &str {
    if cgroup::is_container_id(id) { id.get(..SHORT_ID_DIGITS).unwrap_or(id) } else { id }
}

/// `/usr/bin/x (deleted)` -> `x`.
fn base_name<'a>(path: &'a str, otherwise: &'a str) -> &'a str {
    let path = path.strip_suffix(" (deleted)").unwrap_or(path);
    match path.rsplit('/').next() {
        Some(name) if !name.is_empty() => name,
        _ => otherwise,
    }
}

/// `ssh.service` -> `ssh`; slices and scopes keep their names.
fn trim_unit(unit: &str) -> &str {
    unit.strip_suffix(".service").unwrap_or(unit)
}

/// A task's name as text, up to its NUL.
pub(crate) fn task_name(comm: &[u8]) -> String {
    let name = comm.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

/// Kernel workers are named after CPU and number; the pool is what matters: `kworker/2:1H` -> `kworker/2H`,
/// `kworker/u8:3` -> `kworker/u8`. Source: kernel/workqueue.c: create_worker.
pub(crate) fn fold_kworker(comm: &str) -> String {
    let Some(pool) = comm.strip_prefix("kworker/") else { return comm.to_owned() };
    let Some((pool, worker)) = pool.split_once(':') else { return comm.to_owned() };
    let suffix: String =
        worker.chars().skip_while(char::is_ascii_digit).take_while(|&letter| letter == 'H').collect();
    format!("kworker/{pool}{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(subject: &Subject<'_>, expect: &[(&str, &str)]) {
        let labels = Labeler::new("n1", &[("cluster".into(), "c1".into())]).series(subject);
        let mut expect = expect.to_vec();
        expect.extend([("cluster", "c1"), ("node", "n1")]);
        expect.sort_unstable();
        assert_eq!(labels.iter().collect::<Vec<_>>(), expect);
    }

    #[test]
    fn a_plain_process_is_named_after_its_executable() {
        let subject = Subject { exe: "/usr/bin/burn (deleted)", ..Subject::default() };
        check(&subject, &[("exe", "burn"), ("service_name", "burn")]);
    }

    #[test]
    fn a_container_names_the_service() {
        let id = "ab".repeat(32);
        let owner = Arc::new(Owner { container_id: Some(id.clone()), ..Owner::default() });
        check(
            &Subject { exe: "/app", owner, ..Subject::default() },
            &[
                ("container", "abababababab"),
                ("container_id", &id),
                ("exe", "app"),
                ("service_name", "abababababab"),
            ],
        );
    }

    #[test]
    fn a_container_that_has_a_name_is_called_by_all_of_it() {
        let name = "database-of-the-accountants";
        let owner = Arc::new(Owner { container_id: Some(name.into()), ..Owner::default() });
        let labels = Labeler::new("n", &[]).series(&Subject { exe: "/app", owner, ..Subject::default() });
        assert_eq!(labels.get("container"), Some(name));
    }

    #[test]
    fn a_unit_names_the_service_outside_containers() {
        let (unit, slice) = (Some("ssh.service".into()), Some("system.slice".into()));
        let owner = Arc::new(Owner { unit, slice, container_id: None });
        let subject = Subject { exe: "/usr/sbin/sshd", owner, ..Subject::default() };
        let expect =
            [("exe", "sshd"), ("service_name", "ssh"), ("slice", "system.slice"), ("unit", "ssh.service")];
        check(&subject, &expect);
    }

    #[test]
    fn kernel_threads_share_one_series() {
        let subject = Subject { is_kernel_thread: true, comm: "ksoftirqd/0", ..Subject::default() };
        check(&subject, &[("exe", KERNEL), ("service_name", KERNEL)]);
    }

    #[test]
    fn a_process_that_is_gone_is_named_after_its_comm() {
        check(
            &Subject { comm: "short", ..Subject::default() },
            &[("exe", "short"), ("service_name", "short")],
        );
    }

    #[test]
    fn the_operators_labels_win() {
        let labels = Labeler::new("n1", &[("service_name".into(), "mine".into())])
            .series(&Subject { exe: "/x", ..Subject::default() });
        assert_eq!(labels.get("service_name"), Some("mine"));
    }

    #[test]
    fn kworkers_are_folded_to_their_pool() {
        for (comm, expect) in [
            ("kworker/0:1", "kworker/0"),
            ("kworker/2:1H", "kworker/2H"),
            ("kworker/u8:3", "kworker/u8"),
            ("kworker/u8:3-events", "kworker/u8"),
            ("kworker/R-rcu_g", "kworker/R-rcu_g"),
            ("worker:1", "worker:1"),
        ] {
            assert_eq!(fold_kworker(comm), expect);
        }
    }

    #[test]
    fn task_names_end_at_their_nul() {
        assert_eq!(task_name(b"dd\0\0x\0"), "dd");
        assert_eq!(task_name(b"exactly16bytes!!"), "exactly16bytes!!");
    }
}
