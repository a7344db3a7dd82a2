//! Containers of one image, a systemd unit and a process in neither: each one's samples are under its own labels only,
//! and named, though the executable is in a file system that the agent does not see.

#[path = "support/cgroups.rs"]
mod cgroups;
#[path = "support/containerd.rs"]
mod containerd;
mod support;

use std::{fs, time::SystemTime};

use containerd::Containerd;
use serde_json::Value;
use support::Agent;

/// CPU time after which a program has been sampled often enough, counted from when its names are there: about a thousand
/// times.
const ENOUGH_NS: u64 = 2_000_000_000;
/// The unit's service as systemd would name its cgroup.
const UNIT: &str = "system.slice/burn-test.service";

/// A process, from when on its names count, and the labels that are its own.
struct Subject<'a> {
    pid: u32,
    from: SystemTime,
    container_id: &'a str,
    unit: &'a str,
}

#[test]
#[ignore = "needs root and BPF"]
fn samples_of_containers_of_a_unit_and_of_neither_are_under_their_own_labels_only() {
    let agent = Agent::start(&["-F", "499", "--window", "2s"]);
    let containerd = Containerd::start();
    let lasting = containerd.run("web-0", "5e5b7d5c-0b6a-4a6e-8f4e-000000000000");
    let killed = containerd.run("web-1", "5e5b7d5c-0b6a-4a6e-8f4e-000000000001");
    let unit = containerd.cgroups().start(UNIT, "burn");
    let neither = containerd.cgroups().start("neither", "burn");

    let [first, second, third, fourth] = [killed.pid, lasting.pid, unit.pid(), neither.pid()];
    let (from, consumed_ns) = wait_until_sampled(&agent, first);
    containerd.kill(&killed);
    let others = [second, third, fourth].map(|pid| wait_until_sampled(&agent, pid).0);
    let subjects = [
        Subject { pid: first, from, container_id: &killed.id, unit: "" },
        Subject { pid: second, from: others[0], container_id: &lasting.id, unit: "" },
        Subject { pid: third, from: others[1], container_id: "", unit: "burn-test.service" },
        Subject { pid: fourth, from: others[2], container_id: "", unit: "" },
    ];
    drop((unit, neither));
    containerd.kill(&lasting);
    agent.wait_for_window_after(SystemTime::now());

    for subject in &subjects {
        check_labels(&agent, subject);
        check_names(&agent, subject);
    }
    check_series(&agent, [&killed.id, &lasting.id]);
    let stored_ns = agent.merge(&labels_of(&subjects[0])).total as f64;
    let consumed_ns = consumed_ns as f64;
    assert!(stored_ns >= 0.9 * consumed_ns, "stored {stored_ns} of {consumed_ns} ns of the killed container");
    agent.stop();
}

/// Containers that are started and killed in a row: most live for less time than a drain's longest interval.
const SHORT_LIVED: usize = 8;

#[test]
#[ignore = "needs root and BPF"]
fn a_container_that_is_killed_at_once_keeps_its_samples() {
    // Where everything takes longer, they live for seconds.
    let hz = if support::is_emulated() { "199" } else { "999" };
    let agent = Agent::start(&["-F", hz, "--window", "2s", "--cpu-budget", "1%"]);
    let containerd = Containerd::start();
    let containers: Vec<_> = (0..SHORT_LIVED)
        .map(|number| {
            let container = containerd.run(&format!("web-{number}"), &format!("5e5b7d5c-{number:04}"));
            containerd.kill(&container);
            container
        })
        .collect();
    agent.wait_for_window_after(SystemTime::now());

    let mut sampled = 0;
    for container in &containers {
        let of_process = format!("comm=\"burn\",pid=\"{}\"", container.pid);
        let all = agent.merge(&format!("{{{of_process}}}")).total;
        let labeled = agent.merge(&format!("{{{of_process},container_id=\"{}\"}}", container.id)).total;
        println!("{} ms, {} ms of them under its id", all / 1_000_000, labeled / 1_000_000);
        assert_eq!(
            labeled,
            all,
            "nanoseconds of container {}, under its id and in all; {}",
            container.id,
            labels_in(&agent, &format!("{{{of_process}}}"))
        );
        sampled += usize::from(all > 0);
    }
    assert!(sampled * 2 > SHORT_LIVED, "{sampled} of {SHORT_LIVED} containers were sampled at all");
    agent.stop();
}

/// What the samples that a selector selects are under, and how many cgroups were not found.
fn labels_in(agent: &Agent, selector: &str) -> String {
    let of = |label| format!("{label}: {:?}", values(agent, label, selector));
    let labels = ["exe", "container_id", "unit", "slice"].map(of).join(", ");
    let unknown = agent.metric("profiler_agent_cgroups_unknown_total");
    format!("{labels}; cgroups not found: {unknown:?}")
}

/// Waits until a process has consumed enough CPU time since its names count; gives from when on they do, and all that it has
/// consumed, in nanoseconds.
fn wait_until_sampled(agent: &Agent, pid: u32) -> (SystemTime, u64) {
    let from = agent.counted_from(&format!("{{comm=\"burn\",pid=\"{pid}\"}}"), "hot_loop");
    let before_ns = if support::is_emulated() { consumed_ns(pid) } else { 0 };
    let consumed_ns = agent.wait_for("the process has run for long enough", || {
        let consumed_ns = consumed_ns(pid);
        (consumed_ns - before_ns > ENOUGH_NS).then_some(consumed_ns)
    });
    (from, consumed_ns)
}

fn consumed_ns(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process is there");
    let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
    // proc_pid_stat(5): utime and stime are fields 14 and 15, in ticks of 10 ms; the name is field 2.
    let ticks = fields.split_ascii_whitespace().skip(11).take(2);
    ticks.map(|ticks| ticks.parse::<u64>().expect("ticks")).sum::<u64>() * 10_000_000
}

/// Selects by what the agent has found out about a process.
fn labels_of(subject: &Subject<'_>) -> String {
    let Subject { container_id, unit, .. } = subject;
    format!("{{comm=\"burn\",container_id=\"{container_id}\",unit=\"{unit}\"}}")
}

/// What is under its labels is all of what the kernel said about the process, and of no other process.
fn check_labels(agent: &Agent, subject: &Subject<'_>) {
    let labels = labels_of(subject);
    assert_eq!(values(agent, "pid", &labels), [subject.pid.to_string()], "processes under {labels}");
    let of_process = agent.merge(&format!("{{comm=\"burn\",pid=\"{}\"}}", subject.pid)).total;
    let under_labels = agent.merge(&labels).total;
    assert_eq!(under_labels, of_process, "nanoseconds under {labels} and of process {}", subject.pid);
}

fn check_names(agent: &Agent, subject: &Subject<'_>) {
    let merged = agent.merge_since(&labels_of(subject), subject.from);
    let share = merged.share_below("hot_loop", "outer_work");
    assert!(share >= 0.75, "{}: hot_loop has {share:.2} of the time:\n{merged:#?}", labels_of(subject));
}

/// Containers of one image are series of their own, by their short ids.
fn check_series(agent: &Agent, ids: [&str; 2]) {
    let mut expect = ids.map(|id| id[..12].to_owned());
    expect.sort_unstable();
    assert_eq!(values(agent, "container", "{exe=\"burn\"}"), expect);
    assert_eq!(values(agent, "service_name", "{exe=\"burn\",container!=\"\"}"), expect);
}

/// The values of a label in what a selector selects, in order.
fn values(agent: &Agent, label: &str, selector: &str) -> Vec<String> {
    let answer = agent.query(&format!("/api/v1/labels/{label}/values"), &[("query", selector)]);
    let answer: Value = serde_json::from_slice(&answer).expect("JSON");
    let mut values: Vec<String> = serde_json::from_value(answer["values"].clone()).expect("values");
    values.sort_unstable();
    values
}
