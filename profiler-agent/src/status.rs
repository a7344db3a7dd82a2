//! What the agent says of itself when asked: for people and as JSON.

use std::{collections::BTreeMap, fmt, net::SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{
    ledger::{Balance, Snapshot},
    pipeline::View,
    telemetry,
};

/// What the agent does now.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(tag = "state", content = "why", rename_all = "lowercase")]
pub(crate) enum Phase {
    /// It makes itself ready.
    Starting,
    /// It waits, and for what.
    Waiting(String),
    /// It samples.
    Sampling,
    /// Nothing is attached to the kernel, and who said so.
    Paused(String),
    /// It samples no more, and why.
    Ended(String),
}

impl Phase {
    /// Whether it does what it was told.
    pub(crate) fn is_ready(&self) -> bool {
        matches!(self, Self::Sampling | Self::Paused(_))
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting => f.write_str("starting"),
            Self::Waiting(why) => write!(f, "waiting: {why}"),
            Self::Sampling => f.write_str("sampling"),
            Self::Paused(why) => write!(f, "paused: {why}"),
            Self::Ended(why) => write!(f, "ended: {why}"),
        }
    }
}

/// Which agent it is.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) struct Identity {
    /// Version of the program.
    pub(crate) version: String,
    /// Its process, in its own pid namespace.
    pub(crate) pid: u32,
    /// Label `node`.
    pub(crate) node: String,
    /// Which of several agents of the node.
    pub(crate) instance: Option<String>,
}

/// The answer to `/status`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Report {
    #[serde(flatten)]
    identity: Identity,
    #[serde(flatten)]
    phase: Phase,
    /// Kinds of profiles that it takes.
    profiles: Vec<String>,
    /// Where the embedded backend listens.
    pub(crate) backend: Option<SocketAddr>,
    /// How it goes; none before the stages run.
    health: Option<Health>,
    /// The account of each destination.
    destinations: Vec<Account>,
}

/// How it goes.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Health {
    /// Processes known now.
    pub(crate) processes: u64,
    /// Containers among them.
    pub(crate) containers: u64,
    /// Share of user stacks that end at their root; none before there were any.
    pub(crate) complete_ratio: Option<f64>,
    /// Share of named frames in the last window.
    pub(crate) named_ratio: Option<f64>,
    /// Share of the first user stacks of processes that were walked by tables.
    #[serde(default)]
    pub(crate) first_by_tables_ratio: Option<f64>,
    /// Children of recorded processes that there was no room for.
    #[serde(default)]
    pub(crate) families_not_followed: u64,
    /// CPU time used so far, in seconds.
    pub(crate) cpu_seconds: f64,
    /// Resident memory.
    pub(crate) resident_bytes: u64,
    /// Frequency, use of the CPUs, budget: a line.
    pub(crate) sampling: String,
    /// The memory limit and its parts: a line.
    pub(crate) memory: String,
}

/// taken = delivered + waiting + dropped, in samples of one profile type.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Account {
    destination: String,
    profile_type: String,
    taken: u64,
    delivered: u64,
    waiting: BTreeMap<String, u64>,
    dropped: BTreeMap<String, u64>,
    /// What changed places between the readings, while samples move.
    unaccounted: i64,
    /// The same as a line.
    text: String,
}

impl From<Balance> for Account {
    fn from(balance: Balance) -> Self {
        let (text, unaccounted) = (balance.to_string(), balance.unaccounted());
        let Balance { destination, profile_type, taken, delivered, waiting, dropped } = balance;
        let profile_type = profile_type.name().to_owned();
        let named = |terms: Vec<(&str, u64)>| {
            terms.into_iter().map(|(name, events)| (name.to_owned(), events)).collect()
        };
        let unaccounted = i64::try_from(unaccounted).unwrap_or(i64::MAX);
        let (waiting, dropped) = (named(waiting), named(dropped));
        Self { destination, profile_type, taken, delivered, waiting, dropped, unaccounted, text }
    }
}

impl Report {
    /// What there is to say.
    pub(crate) fn new(
        identity: &Identity,
        phase: Phase,
        profiles: Vec<String>,
        backend: Option<SocketAddr>,
        view: Option<(&View, &Snapshot)>,
    ) -> Self {
        let balances = view.map(|(_, snapshot)| snapshot.balances()).unwrap_or_default();
        Self {
            identity: identity.clone(),
            phase,
            profiles,
            backend,
            health: view.map(|(view, _)| telemetry::health(view)),
            destinations: balances.into_iter().map(Account::from).collect(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { identity, phase, profiles, backend, health, destinations } = self;
        let Identity { version, pid, node, instance } = identity;
        writeln!(f, "{phase}")?;
        let instance = instance.as_ref().map(|name| format!(", instance {name}")).unwrap_or_default();
        let profiles = if profiles.is_empty() { "none".to_owned() } else { profiles.join(", ") };
        writeln!(f, "profiler-agent {version}, pid {pid}, node {node}{instance}; profiles: {profiles}")?;
        if let Some(health) = health {
            writeln!(f, "{health}")?;
        }
        if let Some(backend) = backend {
            writeln!(f, "flame graphs: http://{backend}/")?;
        }
        destinations.iter().try_for_each(|account| writeln!(f, "{}", account.text))
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            processes,
            containers,
            complete_ratio,
            named_ratio,
            first_by_tables_ratio,
            families_not_followed,
            cpu_seconds,
            resident_bytes,
            sampling,
            memory,
        } = self;
        let share =
            |ratio: &Option<f64>| ratio.map_or("-".to_owned(), |ratio| format!("{:.1}%", ratio * 100.0));
        let (complete, named) = (share(complete_ratio), share(named_ratio));
        let (mebibytes, first) = (resident_bytes >> 20, share(first_by_tables_ratio));
        write!(
            f,
            "{processes} processes, {containers} containers; {complete} of stacks to the root, {named} of frames named, \
             {first} of first stacks by tables; {cpu_seconds:.1} s CPU, {mebibytes} MiB"
        )?;
        if *families_not_followed > 0 {
            write!(
                f,
                "\n{families_not_followed} child processes of recorded ones are not sampled: too many"
            )?;
        }
        write!(f, "\nsampling: {sampling}\nmemory: {memory}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{DestinationTotals, KernelTotals, Ledger, PerType, ProfileType};

    fn report() -> Report {
        let identity = Identity {
            version: "1.2.3".to_owned(),
            pid: 71,
            node: "n".to_owned(),
            instance: Some("db".to_owned()),
        };
        let totals = DestinationTotals { delivered: 4, waiting: 5, ..DestinationTotals::default() };
        let of_cpu = |profile_type| profile_type == ProfileType::Cpu;
        let kernel = |of| KernelTotals { taken: if of_cpu(of) { 9 } else { 0 }, submitted: 0 };
        let totals = PerType::from_fn(|of| if of_cpu(of) { totals } else { DestinationTotals::default() });
        let destinations = vec![("http://h/".to_owned(), totals)];
        let balances = Snapshot::take(&Ledger::default(), kernel, destinations).balances();
        let health = Health {
            processes: 3,
            containers: 1,
            complete_ratio: Some(0.9951),
            named_ratio: None,
            first_by_tables_ratio: Some(0.5),
            families_not_followed: 7,
            cpu_seconds: 1.23,
            resident_bytes: 31 << 20,
            sampling: "19 Hz".to_owned(),
            memory: "limit 256 MiB".to_owned(),
        };
        Report {
            identity,
            phase: Phase::Paused("/run/profiler/off exists".to_owned()),
            profiles: vec!["cpu".to_owned()],
            backend: Some(([127, 0, 0, 1], 7700).into()),
            health: Some(health),
            destinations: balances.into_iter().map(Account::from).collect(),
        }
    }

    #[test]
    fn the_text_is_as_designed() {
        insta::assert_snapshot!(report().to_string(), @r"
        paused: /run/profiler/off exists
        profiler-agent 1.2.3, pid 71, node n, instance db; profiles: cpu
        3 processes, 1 containers; 99.5% of stacks to the root, - of frames named, 50.0% of first stacks by tables; 1.2 s CPU, 31 MiB
        7 child processes of recorded ones are not sampled: too many
        sampling: 19 Hz
        memory: limit 256 MiB
        flame graphs: http://127.0.0.1:7700/
        http://h/: cpu: taken 9 = delivered 4 + waiting 5 (upload_queue 5) + dropped 0
        ");
    }

    #[test]
    fn json_says_the_same_and_is_read_back() {
        let json = serde_json::to_value(report()).expect("JSON");
        assert_eq!((&json["state"], &json["why"]), (&"paused".into(), &"/run/profiler/off exists".into()));
        assert_eq!(json["destinations"][0]["waiting"]["upload_queue"], 5);
        assert_eq!(serde_json::from_value::<Report>(json).expect("a report"), report());
    }
}
