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

/// Where the v2 hierarchy is: alone, or beside those of version 1.
fn hierarchy() -> PathBuf {
    let places = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
    let place = places.into_iter().find(|place| place.join("cgroup.controllers").exists());
    place.expect("a v2 hierarchy is mounted").to_path_buf()
}

fn selector(program: &Program) -> String {
    format!("{{pid=\"{}\"}}", program.pid())
}

#[test]
#[ignore = "needs root and BPF"]
fn only_the_processes_names_and_cgroups_that_are_wanted_are_sampled() {
    let name = format!("profiler-test-{}", std::process::id());
    let outer = Cgroup::create(hierarchy().join(&name));
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
    let filtered = agent.metric("profiler_agent_samples_filtered_total{reason=\"target\"}");
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
    let name = format!("profiler-test-namespace-{}", std::process::id());
    let point = hierarchy();
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
    let thinned =
        agent.metric("profiler_agent_samples_filtered_total{reason=\"frequency\"}").expect("metrics");
    let taken = agent.metric("profiler_agent_samples_taken_total").expect("metrics");
    eprintln!("{used_ns} ns used, {sampled_ns} ns by {taken} samples, {thinned} left out");
    assert!((sampled_ns / used_ns - 1.0).abs() <= TOLERANCE, "{sampled_ns} of {used_ns} ns");
    let ratio = (taken + thinned) / taken;
    assert!((4.8..=5.2).contains(&ratio), "one in {ratio}");
    agent.stop();
}
