//! Only what is wanted is sampled, and what is sampled less often counts for more.

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use support::{Agent, Program};

const WINDOW: &str = "2s";

/// Difference accepted between what was sampled and what the kernel accounted.
const TOLERANCE: f64 = 0.05;

/// A cgroup of the v2 hierarchy that goes with its test, when what was in it has ended.
struct Cgroup(PathBuf);

impl Cgroup {
    fn create(path: PathBuf) -> Self {
        fs::create_dir(&path).expect("a cgroup");
        Self(path)
    }

    fn take(&self, program: &Program) {
        fs::write(self.0.join("cgroup.procs"), program.pid().to_string()).expect("move the program");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The kernel may take a moment until the last process has left.
        let end = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.0).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Where the v2 hierarchy is: alone, or beside those of version 1. Without one no cgroup can be a target, and the test that
/// is named is skipped.
fn hierarchy(test: &str) -> Option<PathBuf> {
    let places = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
    let place = places.into_iter().find(|place| place.join("cgroup.controllers").exists());
    if place.is_none() {
        support::skip(test, "no v2 hierarchy is mounted");
    }
    place.map(Path::to_path_buf)
}

fn selector(program: &Program) -> String {
    format!("{{pid=\"{}\"}}", program.pid())
}

#[test]
#[ignore = "needs root and BPF"]
fn only_the_processes_names_and_cgroups_that_are_wanted_are_sampled() {
    let test = "only_the_processes_names_and_cgroups_that_are_wanted_are_sampled";
    let Some(point) = hierarchy(test) else { return };
    let name = format!("profiler-test-{}", std::process::id());
    let outer = Cgroup::create(point.join(&name));
    let by_pid = Program::start("burn", &[]);
    let unwanted = Program::start("burn", &[]);
    let by_name = Program::start("rust_burn", &[]);
    let by_cgroup = Program::start("burn", &[]);
    let agent = Agent::start(&[
        "-F",
        "199",
        "--cpu-budget",
        "off",
        "--window",
        WINDOW,
        "--pid",
        &by_pid.pid().to_string(),
        "--comm",
        "rust_b",
        "--cgroup",
        &format!("/{name}"),
    ]);
    // One below, of which nobody knew at the start.
    let inner = Cgroup::create(outer.0.join("inner"));
    inner.take(&by_cgroup);
    for program in [&by_pid, &by_name, &by_cgroup] {
        agent.wait_for("samples of what is wanted", || {
            (agent.merge(&selector(program)).total > 500_000_000).then_some(())
        });
    }
    assert_eq!(agent.merge(&selector(&unwanted)).total, 0, "nobody wants it");
    let filtered = agent.metric("profiler_agent_samples_filtered_total{type=\"cpu\",reason=\"target\"}");
    assert!(filtered.expect("metrics") > 100.0, "{filtered:?}");
    let log = agent.stop();
    let account = log.lines().find(|line| line.contains("taken ")).expect("an account at the end");
    assert!(account.contains("dropped 0"), "what is filtered is no loss: {account}");
    drop(by_cgroup);
    drop(inner);
}

/// As in a container: what is mounted of the hierarchy begins at the agent's own cgroup, and says that it is the root.
#[test]
#[ignore = "needs root and BPF"]
fn a_cgroup_outside_the_agents_cgroup_namespace_is_a_target() {
    let Some(point) = hierarchy("a_cgroup_outside_the_agents_cgroup_namespace_is_a_target") else { return };
    let name = format!("profiler-test-namespace-{}", std::process::id());
    let (own, wanted) =
        (Cgroup::create(point.join(format!("{name}-own"))), Cgroup::create(point.join(&name)));
    let inner = Cgroup::create(wanted.0.join("inner"));
    let in_cgroup = Program::start("burn", &[]);
    let unwanted = Program::start("burn", &[]);
    inner.take(&in_cgroup);
    let point = point.display();
    let enter = format!(
        "echo $$ >'{}/cgroup.procs' && exec unshare --cgroup sh -c \
         'umount -l {point} && mount -t cgroup2 none {point} && test ! -e {point}/{name} && exec \"$0\" \"$@\"' \
         \"$0\" \"$@\" &&",
        own.0.display()
    );
    let target = format!("/{name}");
    let agent = Agent::start_after(&enter, &["-F", "199", "--window", WINDOW, "--cgroup", &target]);
    agent.wait_for("samples of what is wanted", || {
        (agent.merge(&selector(&in_cgroup)).total > 500_000_000).then_some(())
    });
    assert_eq!(agent.merge(&selector(&unwanted)).total, 0, "nobody wants it");
    agent.stop();
    drop(in_cgroup);
    drop(inner);
}

#[test]
#[ignore = "needs root and BPF"]
fn an_instance_runs_beside_the_agent_of_the_node_and_sees_only_its_cgroup() {
    let test = "an_instance_runs_beside_the_agent_of_the_node_and_sees_only_its_cgroup";
    let Some(point) = hierarchy(test) else { return };
    let name = format!("profiler-test-instance-{}", std::process::id());
    let cgroup = Cgroup::create(point.join(&name));
    let (within, outside) = (Program::start("burn", &[]), Program::start("burn", &[]));
    cgroup.take(&within);
    let run_dir = tempfile::tempdir().expect("a temporary directory");
    let run_dir = run_dir.path().to_str().expect("a plain path");
    let options = ["-F", "99", "--window", WINDOW, "--run-dir", run_dir];
    let node = Agent::start(&options);
    let target = format!("/{name}");
    let instance = Agent::start(&[&options[..], &["--instance", "team", "--cgroup", &target]].concat());
    for (agent, program) in [(&node, &within), (&node, &outside), (&instance, &within)] {
        agent.wait_for("samples of what is wanted", || {
            (agent.merge(&selector(program)).total > 500_000_000).then_some(())
        });
    }
    assert_eq!(instance.merge(&selector(&outside)).total, 0, "it is another's");
    for agent in [node, instance] {
        let log = agent.stop();
        assert!(log.contains("waiting 0 + dropped 0"), "{log}");
    }
    drop(within);
}

#[test]
#[ignore = "needs root and BPF"]
fn the_budget_counts_samples_that_nobody_wants_and_events_of_processes() {
    let _burn = Program::start("burn", &[]);
    let _storm = Program::start("fork_storm", &["500", "600"]);
    let agent = Agent::start(&["-F", "199", "--cpu-budget", "off", "--window", WINDOW, "--comm", "nobody"]);
    for programs in ["samples", "process_events"] {
        let metric = format!("profiler_agent_bpf_seconds_total{{programs=\"{programs}\"}}");
        agent.wait_for(&metric, || agent.metric(&metric).filter(|&seconds| seconds > 0.0));
    }
    assert_eq!(agent.metric("profiler_agent_samples_taken_total"), Some(0.0));
    agent.stop();
}

#[test]
#[ignore = "needs root and BPF"]
fn one_in_n_samples_stand_for_all_of_the_cpu_time() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let config = directory.path().join("agent.toml");
    let text = "target_default = false\n[[target]]\ncomm = \"burn\"\nfrequency = 100\n";
    fs::write(&config, text).expect("write the file");
    let agent = Agent::start(&[
        "--config",
        config.to_str().expect("a plain path"),
        "-F",
        "500",
        "--cpu-budget",
        "off",
        "--window",
        WINDOW,
    ]);
    let program = Program::start("burn", &["-c", "10"]);
    let selector = selector(&program);
    let used: serde_json::Value = serde_json::from_str(&program.output()).expect("what it consumed, as JSON");
    let ended = SystemTime::now();
    // Windows without samples are not stored: another program fills the later ones.
    let _later = Program::start("burn", &[]);
    agent.wait_for_window_after(ended);
    let used_ns = used["cpu_ns"].as_f64().expect("a number");
    let sampled_ns = agent.merge(&selector).total as f64;
    let thinned = agent
        .metric("profiler_agent_samples_filtered_total{type=\"cpu\",reason=\"frequency\"}")
        .expect("metrics");
    let taken = agent.metric("profiler_agent_samples_taken_total").expect("metrics");
    eprintln!("{used_ns} ns used, {sampled_ns} ns by {taken} samples, {thinned} left out");
    assert!((sampled_ns / used_ns - 1.0).abs() <= TOLERANCE, "{sampled_ns} of {used_ns} ns");
    let ratio = (taken + thinned) / taken;
    assert!((4.8..=5.2).contains(&ratio), "one in {ratio}");
    agent.stop();
}

/// What `profiler-agent targets --json` says of the running agent.
fn census(agent: &Agent) -> serde_json::Value {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_profiler-agent"))
        .args(["--listen", &agent.agent.to_string(), "targets", "--json"])
        .output()
        .expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The same of one process.
fn said_of(agent: &Agent, program: &Program) -> serde_json::Value {
    let census = census(agent);
    let processes = census["processes"].as_array().expect("a list");
    let found = processes.iter().find(|process| process["pid"] == program.pid());
    found.unwrap_or_else(|| panic!("{} in {census:#}", program.pid())).clone()
}

#[test]
#[ignore = "needs root and BPF"]
fn targets_and_kinds_of_profiles_change_with_the_file_and_are_shown() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let config = directory.path().join("agent.toml");
    fs::write(&config, "").expect("write the file");
    let file = config.to_str().expect("a plain path");
    let agent = Agent::start(&["--config", file, "-F", "200", "--cpu-budget", "off", "--window", WINDOW]);
    let (burn, rust) = (Program::start("burn", &[]), Program::start("rust_burn", &[]));
    let seen_since = |program: &Program, moment| agent.merge_since(&selector(program), moment).total;
    let start = SystemTime::now();
    agent.wait_for("samples of both", || {
        (seen_since(&burn, start) > 0 && seen_since(&rust, start) > 0).then_some(())
    });
    let of_burn = said_of(&agent, &burn);
    assert_eq!((&of_burn["target"], &of_burn["sampled"]), (&serde_json::Value::Null, &true.into()));
    assert_eq!((&of_burn["frequency_hz"], &of_burn["profiles"][0]), (&200.0.into(), &"cpu".into()));

    // The file changes: within a second, without a signal.
    let text = "target_default = false\n[[target]]\ncomm = \"rust_b\"\nfrequency = 50\n";
    fs::write(&config, text).expect("write the file");
    agent.wait_for("the new targets are in force", || {
        (said_of(&agent, &burn)["sampled"] == false).then_some(())
    });
    let of_rust = said_of(&agent, &rust);
    assert_eq!((&of_rust["target"], &of_rust["frequency_hz"]), (&1.into(), &50.0.into()), "{of_rust}");
    let log = agent.log();
    assert!(log.contains("target is changed") && log.contains("target_default is changed"), "{log}");
    let changed = SystemTime::now() + Duration::from_secs(2);
    agent.wait_for("later samples of what is wanted", || (seen_since(&rust, changed) > 0).then_some(()));
    assert_eq!(seen_since(&burn, changed), 0, "nobody wants it any more");

    // SIGHUP: no kind of profiles, then all as before.
    fs::write(&config, "profiles = []\n").expect("write the file");
    agent.hang_up();
    agent.wait_for("no clock event is open", || (clock_events(&agent) == 0).then_some(()));
    assert!(agent.log().contains("profiles is changed"), "{}", agent.log());
    assert_eq!(census(&agent)["default"]["sampled"], false);
    fs::write(&config, "").expect("write the file");
    agent.hang_up();
    let again = SystemTime::now();
    agent.wait_for("samples of both again", || {
        (seen_since(&burn, again) > 0 && seen_since(&rust, again) > 0).then_some(())
    });
    assert!(clock_events(&agent) > 0);

    // One that is refused changes nothing.
    fs::write(&config, "[[target]]\nfrequency = 5\n").expect("write the file");
    agent.hang_up();
    agent.wait_for("it is refused", || {
        agent.log().contains("the new configuration is refused, the old one stays: target").then_some(())
    });
    assert_eq!(said_of(&agent, &burn)["sampled"], true);
    let log = agent.stop();
    let account = log.lines().find(|line| line.contains("taken ")).expect("an account at the end");
    assert!(account.contains("dropped 0"), "what is filtered is no loss: {account}");
}

/// Clock events that an agent has open: all of its events but those that tell of mappings.
fn clock_events(agent: &Agent) -> usize {
    let entries = fs::read_dir(format!("/proc/{}/fd", agent.pid())).expect("its descriptors").flatten();
    let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    let events = links.filter(|link| link.to_string_lossy().contains("[perf_event]")).count();
    let mapping_events = agent.metric("profiler_agent_mapping_event_cpus").expect("metrics");
    events - mapping_events as usize
}
