//! Who a process is, while it changes: every sample is under the image that ran, and under no other's labels.

#[path = "support/cgroups.rs"]
mod cgroups;
mod support;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use aya::{maps::loaded_maps, programs::loaded_programs};
use cgroups::Cgroups;
use serde_json::Value;
use support::{Agent, Merged, Program, testprogs};

/// CPU time after which a program has been seen often enough.
const ENOUGH_NS: i64 = 350_000_000;

#[test]
#[ignore = "needs root and BPF"]
fn every_sample_is_under_the_image_that_ran() {
    let agent = Agent::start(&["-F", "499", "--window", "2s"]);
    // Where everything takes longer, names of a file come later than such programs end.
    let seconds = if support::is_emulated() { "6" } else { "0.7" };
    if support::is_emulated() {
        wait_for_names_of_programs(&agent);
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let [deleted, replaced] = ["deleted_image", "replaced_image"].map(|name| copy_of_burn(&directory, name));
    let burn = testprogs().join("burn").display().to_string();
    let [exec, memfd, reuse] = [["exec", "1.4"], ["memfd", seconds], ["reuse", "0.7"]]
        .map(|[what, seconds]| Program::start("identity", &[what, &burn, "-c", seconds]));
    let leader = Program::start("identity", &["leader"]);
    let rename = Program::start("identity", &["rename", "new_name"]);
    let gone = [&deleted, &replaced].map(|image| start_image(image, seconds));
    fs::remove_file(&deleted).expect("remove the image");
    fs::copy(testprogs().join("short"), directory.path().join("other")).expect("another image");
    fs::rename(directory.path().join("other"), &replaced).expect("replace the image");

    let [exec, memfd, reuse, leader, rename] =
        [exec, memfd, reuse, leader, rename].map(|program| (program.pid(), program.output()));
    let gone = gone.map(|program| (program.pid(), program.output()));
    agent.wait_for_window_after(SystemTime::now());

    check(&agent, exec.0, &[("identity", "identity"), ("burn", "burn")]);
    check(&agent, memfd.0, &[("memfd:in_memory", ANY)]);
    let reused =
        reuse.1.lines().last().and_then(|pid| pid.parse().ok()).expect("the pid that was used twice");
    check(&agent, reused, &[("identity", "identity"), ("burn", "burn")]);
    check(&agent, leader.0, &[("identity", "identity")]);
    check(&agent, rename.0, &[("identity", "identity"), ("identity", "new_name")]);
    check(&agent, gone[0].0, &[("deleted_image", "deleted_image")]);
    check(&agent, gone[1].0, &[("replaced_image", "replaced_image")]);
    check_names(&agent, &format!("{{pid=\"{}\",exe=\"burn\"}}", exec.0), "hot_loop", "outer_work");
    check_names(&agent, &format!("{{pid=\"{}\"}}", leader.0), "identity_work", "work_and_exit");
    check_names(
        &agent,
        &format!("{{pid=\"{}\",exe=\"memfd:in_memory\"}}", memfd.0),
        "hot_loop",
        "outer_work",
    );
    for (pid, _) in gone {
        check_names(&agent, &format!("{{pid=\"{pid}\"}}"), "hot_loop", "outer_work");
    }
    agent.stop();
}

#[test]
#[ignore = "needs root and BPF"]
fn processes_of_nested_pid_namespaces_are_known_by_their_pids_outside() {
    let agent = Agent::start(&["-F", "499", "--window", "2s"]);
    let burn = testprogs().join("burn").display().to_string();
    let nested = ["--pid", "--fork", "--kill-child", "unshare", "--pid", "--fork", "--kill-child", &burn];
    let outer = Program::system("unshare", &nested);
    let pid = agent.wait_for("the program runs in a namespace of a namespace", || {
        let child =
            |pid| fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?.trim().parse().ok();
        let burn: u32 = child(child(outer.pid())?)?;
        (fs::read_to_string(format!("/proc/{burn}/comm")).ok()? == "burn\n").then_some(burn)
    });
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the program runs");
    let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:")).expect("pids by namespace");
    assert_eq!(pids.split_ascii_whitespace().count(), 3, "{pids}");
    let of_burn = format!("{{exe=\"burn\",pid=\"{pid}\"}}");
    let from = agent.counted_from(&of_burn, "hot_loop");
    let merged = agent.wait_for("its samples are stored", || {
        let merged = agent.merge_since(&of_burn, from);
        (merged.total > ENOUGH_NS).then_some(merged)
    });
    check_share(&merged, &of_burn, "hot_loop", "outer_work");
    drop(outer);
    agent.stop();
}

/// The ids of cgroups are read from the task itself where no v2 hierarchy is mounted.
#[test]
#[ignore = "needs root and BPF"]
fn without_the_v2_hierarchy_units_are_known_by_a_v1_controller() {
    let Some(point) = unified_of_a_hybrid_host() else {
        support::skip(
            "without_the_v2_hierarchy_units_are_known_by_a_v1_controller",
            "no v1 hierarchy beside v2 here",
        );
        return;
    };
    let agent = Agent::start_after(&format!("umount '{point}' &&"), &["-F", "999", "--window", "2s"]);
    let cgroups = Cgroups::new();
    let short = testprogs().join("short").display().to_string();
    let script = format!(
        "{} for i in 1 2 3 4 5 6 7 8; do '{short}' 3; done",
        cgroups.moves_in("pids", "v1-test.service")
    );
    // All are gone, and so is their cgroup, by the time that the last samples are looked at.
    let _ = support::run("sh", &["-c", &script]);
    cgroups.clear();
    agent.wait_for_window_after(SystemTime::now());
    let [all, labeled] = ["{comm=\"short\"}", "{comm=\"short\",unit=\"v1-test.service\"}"]
        .map(|selector| agent.merge(selector).total);
    assert!(all > 0, "no sample of eight programs of 3 ms");
    // Behind cgroup_exit() a task is in the root of every v1 hierarchy: a process whose only sample falls there has no unit.
    assert!(labeled * 10 >= all * 9, "{labeled} of {all} ns under the unit");
    agent.stop();
}

#[test]
#[ignore = "needs root and BPF"]
fn nothing_stays_in_the_kernel_when_the_agent_is_killed() {
    let before = in_kernel();
    let agent = Agent::start(&["-F", "99", "--window", "2s"]);
    let with_agent = in_kernel();
    let own: BTreeSet<_> = with_agent.difference(&before).cloned().collect();
    assert!(own.iter().any(|object| object.starts_with("program cpu_sample")), "{own:?}");
    assert!(own.iter().any(|object| object.starts_with("map EVENTS")), "{own:?}");
    let pinned = fs::read_dir("/sys/fs/bpf").map_or(0, Iterator::count);

    agent.kill();
    // The kernel frees programs and maps when nobody can be running or reading them any more.
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let left: Vec<_> = in_kernel().intersection(&own).cloned().collect();
        if left.is_empty() {
            break;
        }
        assert!(Instant::now() < end, "left in the kernel: {left:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(fs::read_dir("/sys/fs/bpf").map_or(0, Iterator::count), pinned, "pinned objects");
}

/// Every BPF program and map there is, by name and id.
fn in_kernel() -> BTreeSet<String> {
    let programs = loaded_programs().filter_map(|program| {
        let program = program.ok()?;
        Some(format!("program {} {}", program.name_as_str()?, program.id()))
    });
    let maps = loaded_maps().filter_map(|map| {
        let map = map.ok()?;
        Some(format!("map {} {}", map.name_as_str()?, map.id()))
    });
    programs.chain(maps).collect()
}

/// Where the v2 hierarchy is mounted beside those of v1.
fn unified_of_a_hybrid_host() -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let fields = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mounts: Vec<_> = mounts.lines().map(fields).collect();
    let has_pids =
        mounts.iter().any(|mount| mount[2] == "cgroup" && mount[3].split(',').any(|option| option == "pids"));
    let unified = mounts.into_iter().find(|mount| mount[2] == "cgroup2")?;
    has_pids.then(|| unified[1].clone())
}

/// The kernel names what is run by its descriptor after that, or after the file (Linux 6.14).
const ANY: &str = "*";

/// What the process's samples are under are these pairs of image and name, each with enough CPU time.
#[track_caller]
fn check(agent: &Agent, pid: u32, expect: &[(&str, &str)]) {
    let expect: BTreeSet<_> = expect.iter().map(|&(exe, comm)| (exe.to_owned(), comm.to_owned())).collect();
    let mut found = BTreeSet::new();
    for exe in values(agent, "exe", &format!("{{pid=\"{pid}\"}}")) {
        for comm in values(agent, "comm", &format!("{{pid=\"{pid}\",exe=\"{exe}\"}}")) {
            let of_both = format!("{{pid=\"{pid}\",exe=\"{exe}\",comm=\"{comm}\"}}");
            let total = agent.merge(&of_both).total;
            println!("{of_both}: {} ms", total / 1_000_000);
            // The moment between fork and exec, and the dynamic linker's, are nobody's promise.
            if total >= 20_000_000 {
                let is_any = expect.contains(&(exe.clone(), ANY.to_owned()));
                found.insert((exe.clone(), if is_any { ANY.to_owned() } else { comm }));
            }
        }
    }
    assert_eq!(found, expect, "process {pid}");
}

#[track_caller]
fn check_names(agent: &Agent, selector: &str, function: &str, caller: &str) {
    check_share(&agent.merge(selector), selector, function, caller);
}

#[track_caller]
fn check_share(merged: &Merged, selector: &str, function: &str, caller: &str) {
    let share = merged.share_below(function, caller);
    assert!(share >= 0.75, "{selector}: {function} under {caller} has {share:.2} of the time:\n{merged:#?}");
}

fn copy_of_burn(directory: &tempfile::TempDir, name: &str) -> PathBuf {
    let image = directory.path().join(name);
    fs::copy(testprogs().join("burn"), &image).expect("copy the image");
    image
}

fn start_image(image: &Path, seconds: &str) -> Program {
    Program::start(image.to_str().expect("a plain path"), &["-c", seconds])
}

fn wait_for_names_of_programs(agent: &Agent) {
    let _burn = Program::start("burn", &[]);
    agent.wait_for("names of the programs", || {
        // Ends after 1.4 s of CPU time.
        Program::start("identity", &["rename", "early"]).output();
        let is_named = |exe, function| agent.merge(&format!("{{exe=\"{exe}\"}}")).mentions(function);
        (is_named("identity", "identity_work") && is_named("burn", "hot_loop")).then_some(())
    });
    agent.wait_for_names();
}

/// The values of a label in what a selector selects.
fn values(agent: &Agent, label: &str, selector: &str) -> Vec<String> {
    let answer = agent.query(&format!("/api/v1/labels/{label}/values"), &[("query", selector)]);
    let answer: Value = serde_json::from_slice(&answer).expect("JSON");
    serde_json::from_value(answer["values"].clone()).expect("values")
}
