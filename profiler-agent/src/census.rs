//! Who is sampled: every process of the machine, the target that it meets, how often, and for which profiles.
//!
//! Asked for, never on the way of samples: reads `/proc` and decides as the kernel side does, by the same comparisons.

use std::{
    collections::BTreeMap,
    fmt, fs,
    num::NonZeroU32,
    path::{Path, PathBuf},
};

use profiler_common::targets::Target as Wire;
use serde::{Deserialize, Serialize};

use crate::{
    heap::HeapState,
    label::{Owner, owner, short_name, task_name},
    ledger::ProfileType,
    pipeline::period_ns,
    process::pids,
    status::Phase,
    targets::{Target, Targets, comm_words},
};

/// Processes that are looked at.
const PROCESSES_MAX: usize = 32 << 10;
/// Pids shown of processes that are alike.
const PIDS_SHOWN: usize = 4;

/// What the agent is told to sample, and how it stands with it.
pub(crate) struct Asked<'a> {
    /// Root of `/proc`.
    pub(crate) proc: &'a Path,
    /// Root of the whole cgroup hierarchy of version 2, where that is here.
    pub(crate) hierarchy: Option<&'a Path>,
    pub(crate) phase: Phase,
    pub(crate) targets: &'a Targets,
    /// Kinds of profiles, of the configuration.
    pub(crate) profiles: &'a [String],
    /// Samples a second and CPU now.
    pub(crate) frequency_hz: u32,
    /// Whether a target's cgroup means those below it too; before kernel 5.15 or so it does not.
    pub(crate) includes_below: bool,
    pub(crate) heap: BTreeMap<u32, HeapState>,
}

/// The answer to `/targets`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Census {
    #[serde(flatten)]
    phase: Phase,
    /// Kinds of profiles that are taken.
    profiles: Vec<String>,
    /// Samples a second and CPU now: what is configured, or less by the CPU budget.
    frequency_hz: u32,
    /// In the order that decides.
    targets: Vec<TargetRow>,
    /// What meets none.
    default: DefaultRow,
    processes: Vec<ProcessRow>,
    /// Processes beyond those that are looked at.
    processes_left_out: usize,
}

/// A target, and how many processes meet it and none before it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct TargetRow {
    /// 1 for the first.
    target: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    comm: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup: Option<PathBuf>,
    /// Whether its cgroup is there; none without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup_exists: Option<bool>,
    sampled: bool,
    /// 0 when it is not sampled.
    frequency_hz: f64,
    processes: usize,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct DefaultRow {
    sampled: bool,
    frequency_hz: f64,
    processes: usize,
}

/// A process.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct ProcessRow {
    pid: u32,
    comm: String,
    /// In the v2 hierarchy.
    cgroup: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<String>,
    /// Number of the target that decides; none for the default.
    target: Option<usize>,
    sampled: bool,
    frequency_hz: f64,
    /// Types of the profiles that it is in.
    profiles: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    heap: Option<HeapState>,
}

/// What decides about a process.
struct Identity {
    pid: u32,
    comm: Vec<u8>,
    cgroup: String,
    owner: Owner,
}

impl Identity {
    /// `None` for one that is gone.
    fn read(proc: &Path, pid: u32) -> Option<Self> {
        let directory = proc.join(pid.to_string());
        let mut comm = fs::read(directory.join("comm")).ok()?;
        comm.truncate(comm.strip_suffix(b"\n").map_or(comm.len(), <[u8]>::len));
        let cgroups = fs::read_to_string(directory.join("cgroup")).unwrap_or_default();
        let v2 = cgroups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
        let cgroup = v2.strip_suffix(" (deleted)").unwrap_or(v2).to_owned();
        Some(Self { pid, comm, cgroup, owner: owner(&cgroups) })
    }
}

/// One target as both sides see it.
struct Judge<'a> {
    target: &'a Target,
    wire: Wire,
    frequency_hz: f64,
}

impl Judge<'_> {
    fn is_met(&self, process: &Identity, includes_below: bool) -> bool {
        self.wire.matches_process(process.pid, comm_words(&process.comm))
            && self.target.cgroup.as_deref().is_none_or(|cgroup| is_in(process, cgroup, includes_below))
    }
}

fn is_in(process: &Identity, cgroup: &Path, includes_below: bool) -> bool {
    let plain = |path: &Path| -> PathBuf { crate::targets::names(path).collect() };
    let (found, wanted) = (plain(Path::new(&process.cgroup)), plain(cgroup));
    !process.cgroup.is_empty() && if includes_below { found.starts_with(&wanted) } else { found == wanted }
}

impl Census {
    /// Looks at every process.
    pub(crate) fn take(asked: Asked<'_>) -> Self {
        let Asked { proc, hierarchy, phase, targets, profiles, frequency_hz, includes_below, heap } = asked;
        let takes = |profile_type: ProfileType| profiles.iter().any(|kind| kind == profile_type.name());
        let (has_cpu, has_faults) = (takes(ProfileType::Cpu), takes(ProfileType::PageFaults));
        let wire = targets.to_wire(hierarchy);
        let judges: Vec<_> = targets
            .list()
            .iter()
            .zip(&wire.targets)
            .map(|(target, &wire)| {
                let one_in = wire.one_in(period_ns(frequency_hz));
                Judge { target, wire, frequency_hz: kept(frequency_hz, one_in, target.is_wanted && has_cpu) }
            })
            .collect();
        let default_hz = kept(frequency_hz, NonZeroU32::MIN, targets.is_default_wanted() && has_cpu);

        let mut pids = pids(proc).unwrap_or_default();
        pids.sort_unstable();
        let processes_left_out = pids.len().saturating_sub(PROCESSES_MAX);
        let rows: Vec<ProcessRow> = pids
            .into_iter()
            .take(PROCESSES_MAX)
            .filter_map(|pid| Identity::read(proc, pid))
            .map(|process| {
                let met = judges.iter().position(|judge| judge.is_met(&process, includes_below));
                let frequency_hz = met.map_or(default_hz, |at| judges[at].frequency_hz);
                let is_wanted = met.map_or(targets.is_default_wanted(), |at| judges[at].target.is_wanted);
                row(process, met, (frequency_hz, is_wanted && has_faults), &heap)
            })
            .collect();
        let count = |target: Option<usize>| rows.iter().filter(|row| row.target == target).count();
        let target_rows =
            judges.iter().enumerate().map(|(at, judge)| judge.row(at + 1, count(Some(at + 1)))).collect();
        let is_default_sampled = default_hz > 0.0;
        let default =
            DefaultRow { sampled: is_default_sampled, frequency_hz: default_hz, processes: count(None) };
        Self {
            phase,
            profiles: profiles.to_vec(),
            frequency_hz,
            targets: target_rows,
            default,
            processes: rows,
            processes_left_out,
        }
    }
}

/// One of so many samples is kept; none where nothing is wanted.
fn kept(frequency_hz: u32, one_in: NonZeroU32, is_wanted: bool) -> f64 {
    if is_wanted { f64::from(frequency_hz) / f64::from(one_in.get()) } else { 0.0 }
}

fn row(
    process: Identity,
    met: Option<usize>,
    (frequency_hz, has_faults): (f64, bool),
    heap: &BTreeMap<u32, HeapState>,
) -> ProcessRow {
    let Identity { pid, comm, cgroup, owner } = process;
    let heap = heap.get(&pid).cloned();
    let has_heap = matches!(heap, Some(HeapState::Profiled { .. }));
    let types = [
        (ProfileType::Cpu.name(), frequency_hz > 0.0),
        (ProfileType::PageFaults.name(), has_faults),
        (ProfileType::Allocs.name(), has_heap),
        ("heap", has_heap),
    ];
    ProcessRow {
        pid,
        comm: task_name(&comm),
        cgroup,
        container: owner.container_id.as_deref().map(|id| short_name(id).to_owned()),
        unit: owner.unit,
        target: met.map(|at| at + 1),
        sampled: frequency_hz > 0.0,
        frequency_hz,
        profiles: types
            .into_iter()
            .filter(|(_, is_taken)| *is_taken)
            .map(|(name, _)| name.to_owned())
            .collect(),
        heap,
    }
}

impl Judge<'_> {
    fn row(&self, number: usize, processes: usize) -> TargetRow {
        let Target { pid, comm, cgroup, frequency_hz: _, is_wanted: _ } = self.target;
        TargetRow {
            target: number,
            pid: *pid,
            comm: comm.as_ref().map(|comm| comm.as_str().to_owned()),
            cgroup: cgroup.clone(),
            cgroup_exists: cgroup.as_ref().map(|_| self.wire.cgroup_id != 0),
            sampled: self.frequency_hz > 0.0,
            frequency_hz: self.frequency_hz,
            processes,
        }
    }
}

impl TargetRow {
    fn whom(&self) -> String {
        let missing = if self.cgroup_exists == Some(false) { " (not there)" } else { "" };
        let conditions = [
            self.pid.map(|pid| format!("pid {pid}")),
            self.comm.as_ref().map(|comm| format!("comm {comm}")),
            self.cgroup.as_ref().map(|cgroup| format!("cgroup {}{missing}", cgroup.display())),
        ];
        conditions.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// `5 Hz`, `4.75 Hz`; `-` for none.
fn hertz(frequency_hz: f64) -> String {
    if frequency_hz == 0.0 {
        return "-".to_owned();
    }
    let text = format!("{frequency_hz:.2}");
    format!("{} Hz", text.trim_end_matches('0').trim_end_matches('.'))
}

fn number(target: Option<usize>) -> String {
    target.map_or("-".to_owned(), |number| number.to_string())
}

/// Processes that are alike: target, who they belong to, name, profiles.
type Kind<'a> = (Option<usize>, &'a str, &'a str, &'a [String]);

impl Census {
    /// Processes that are sampled, those of one kind together.
    fn kinds(&self) -> BTreeMap<Kind<'_>, Vec<&ProcessRow>> {
        let mut kinds: BTreeMap<Kind<'_>, Vec<_>> = BTreeMap::new();
        for process in self.processes.iter().filter(|process| !process.profiles.is_empty()) {
            let owner = process.container.as_deref().or(process.unit.as_deref()).unwrap_or("-");
            let kind = (process.target, owner, process.comm.as_str(), process.profiles.as_slice());
            kinds.entry(kind).or_default().push(process);
        }
        kinds
    }

    fn write_targets(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |target: &str, sampled: bool, frequency_hz, processes: usize, whom: &str| {
            let sampled = if sampled { "yes" } else { "no" };
            format!("{target:<7} {sampled:<8} {:<10} {processes:<10} {whom}", hertz(frequency_hz))
        };
        writeln!(f, "TARGET  SAMPLED  FREQUENCY  PROCESSES  WHOM")?;
        for row in &self.targets {
            let target = row.target.to_string();
            writeln!(f, "{}", line(&target, row.sampled, row.frequency_hz, row.processes, &row.whom()))?;
        }
        let DefaultRow { sampled, frequency_hz, processes } = self.default;
        let whom = if self.targets.is_empty() { "everything" } else { "everything else" };
        writeln!(f, "{}", line("-", sampled, frequency_hz, processes, whom))
    }

    fn write_processes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\nTARGET  FREQUENCY  PROFILES           OWNER                     NAME             PIDS"
        )?;
        for ((target, owner, comm, profiles), processes) in self.kinds() {
            let frequency = hertz(processes.first().map_or(0.0, |process| process.frequency_hz));
            let profiles = profiles.join(", ");
            let mut pids: Vec<_> =
                processes.iter().take(PIDS_SHOWN).map(|process| process.pid.to_string()).collect();
            if processes.len() > PIDS_SHOWN {
                pids.push(format!("and {} more", processes.len() - PIDS_SHOWN));
            }
            let (target, pids) = (number(target), pids.join(", "));
            writeln!(f, "{target:<7} {frequency:<10} {profiles:<18} {owner:<25} {comm:<16} {pids}")?;
        }
        match self.processes_left_out {
            0 => Ok(()),
            left_out => writeln!(f, "and {left_out} processes that were not looked at"),
        }
    }

    fn write_heaps(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut heaps = self.processes.iter().filter_map(|process| Some((process, process.heap.as_ref()?)));
        let Some(first) = heaps.next() else { return Ok(()) };
        writeln!(f, "\nHEAP OF  NAME             STATE")?;
        for (process, state) in std::iter::once(first).chain(heaps) {
            writeln!(f, "{:<8} {:<16} {state}", process.pid, process.comm)?;
        }
        Ok(())
    }
}

impl fmt::Display for Census {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let profiles = if self.profiles.is_empty() { "none".to_owned() } else { self.profiles.join(", ") };
        writeln!(f, "{}; profiles: {profiles}; {} Hz per CPU\n", self.phase, self.frequency_hz)?;
        self.write_targets(f)?;
        self.write_processes(f)?;
        self.write_heaps(f)
    }
}

impl fmt::Display for HeapState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Profiled { rate, file, functions } => {
                write!(f, "profiled: a sample in {rate} bytes, {functions} functions of {file}")
            }
            Self::Refused { why } => write!(f, "not profiled: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::targets::CommPrefix;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    /// A `/proc` with processes: pid, name, v2 cgroup; and a v2 hierarchy with their cgroups.
    fn machine(processes: &[(u32, &str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        let mount = root.path().join("cgroup");
        for (pid, comm, cgroup) in processes {
            let directory = root.path().join(pid.to_string());
            fs::create_dir(&directory).expect("a directory");
            fs::write(directory.join("comm"), format!("{comm}\n")).expect("write");
            fs::write(directory.join("cgroup"), format!("0::{cgroup}\n")).expect("write");
            fs::create_dir_all(mount.join(cgroup.trim_start_matches('/'))).expect("a directory");
        }
        root
    }

    fn target(
        comm: Option<&str>,
        cgroup: Option<&str>,
        frequency_hz: Option<u32>,
        is_wanted: bool,
    ) -> Target {
        let comm = comm.map(|comm| CommPrefix::new(comm).expect("a name"));
        Target { pid: None, comm, cgroup: cgroup.map(Into::into), frequency_hz, is_wanted }
    }

    fn census(root: &Path, targets: Vec<Target>, default: bool, heap: &[(u32, HeapState)]) -> Census {
        Census::take(Asked {
            proc: root,
            hierarchy: Some(&root.join("cgroup")),
            phase: Phase::Sampling,
            targets: &Targets::new(targets, default).expect("few"),
            profiles: &["cpu".to_owned()],
            frequency_hz: 19,
            includes_below: true,
            heap: heap.iter().cloned().collect(),
        })
    }

    #[test]
    fn the_text_is_as_designed() {
        let container = format!("/system.slice/docker-{ID}.scope");
        let processes: Vec<_> = (20..25).map(|pid| (pid, "nginx", "/system.slice/noisy.service/a")).collect();
        let root = machine(
            &[
                &[(7, "postgres: wal", container.as_str()), (8, "postgres", "/"), (9, "sh", "/user.slice")],
                processes.as_slice(),
            ]
            .concat(),
        );
        let heap = [
            (8, HeapState::Profiled { rate: 524_288, file: "libc.so.6".to_owned(), functions: 9 }),
            (9, HeapState::Refused { why: "none of its files defines malloc".to_owned() }),
        ];
        let targets = vec![
            target(Some("postgres"), None, Some(5), true),
            target(None, Some("/system.slice/noisy.service"), None, true),
            target(Some("sh"), Some("/nowhere"), None, true),
            target(Some("sh"), None, None, false),
        ];
        insta::assert_snapshot!(census(root.path(), targets, true, &heap).to_string());
    }

    #[test]
    fn the_first_target_that_a_process_meets_decides() {
        let root = machine(&[(7, "x", "/a/b"), (8, "x", "/ab"), (9, "y", "/a"), (10, "z", "/c")]);
        let targets =
            vec![target(Some("x"), Some("/a"), None, false), target(None, Some("/a/"), Some(1), true)];
        let found = census(root.path(), targets, true, &[]);
        let decided: Vec<_> =
            found.processes.iter().map(|process| (process.pid, process.target, process.sampled)).collect();
        let expect = [(7, Some(1), false), (8, None, true), (9, Some(2), true), (10, None, true)];
        assert_eq!(decided, expect);
        let counts: Vec<_> = found.targets.iter().map(|row| row.processes).collect();
        assert_eq!((counts, found.default.processes), (vec![1, 1], 2));
        assert_eq!(found.targets[1].frequency_hz, 1.0, "19 Hz, one in 19");
        assert_eq!(found.targets[1].cgroup_exists, Some(true));
    }

    #[test]
    fn without_the_kind_cpu_nobody_is_sampled() {
        let root = machine(&[(7, "x", "/")]);
        let targets = Targets::new(Vec::new(), true).expect("none");
        let found = Census::take(Asked {
            proc: root.path(),
            hierarchy: None,
            phase: Phase::Sampling,
            targets: &targets,
            profiles: &[],
            frequency_hz: 19,
            includes_below: true,
            heap: BTreeMap::new(),
        });
        assert!(!found.default.sampled && !found.processes[0].sampled);
        assert!(found.to_string().contains("profiles: none"), "{found}");
    }

    #[test]
    fn json_says_the_same_and_is_read_back() {
        let root = machine(&[(7, "x", "/a")]);
        let heap = [(7, HeapState::Refused { why: "y".to_owned() })];
        let found = census(root.path(), vec![target(None, Some("/a"), Some(5), true)], false, &heap);
        let json = serde_json::to_value(&found).expect("JSON");
        assert_eq!((&json["state"], &json["targets"][0]["cgroup"]), (&"sampling".into(), &"/a".into()));
        assert_eq!(
            (&json["processes"][0]["target"], &json["default"]["sampled"]),
            (&1.into(), &false.into())
        );
        assert_eq!(json["processes"][0]["heap"]["state"], "refused");
        assert_eq!(serde_json::from_value::<Census>(json).expect("a census"), found);
    }

    #[test]
    fn this_process_is_found_on_this_machine() {
        let found = census(Path::new("/proc"), Vec::new(), true, &[]);
        let own = found.processes.iter().find(|process| process.pid == std::process::id()).expect("it lives");
        assert!(own.sampled && !own.comm.is_empty(), "{own:?}");
    }
}
