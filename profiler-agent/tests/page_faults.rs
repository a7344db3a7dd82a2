//! Page-fault profiles say which code makes the memory of a program grow.

mod support;

use std::{fs, time::SystemTime};

use support::{Agent, Program};

/// Faults between two samples.
const PERIOD: f64 = 509.0;
const PAGE: f64 = 4096.0;
const MIB: f64 = 1_048_576.0;
/// What the program touches, has the kernel fill, and reads of a file.
const TOUCHED_MIB: f64 = 256.0;
const FILLED_MIB: f64 = TOUCHED_MIB / 4.0;
const FILE_MIB: usize = 256;

/// 4 standard deviations, if samples came at random: the kernel's come evenly, so that the true error is smaller.
fn accepted(bytes: f64) -> f64 {
    let samples = bytes / PAGE / PERIOD;
    4.0 / samples.sqrt() + 0.01
}

#[test]
#[ignore = "needs root and BPF"]
fn memory_is_where_it_was_touched_and_pages_of_files_are_nowhere() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("file");
    // Its pages are in memory, so that they come by the same kind of fault.
    fs::write(&file, vec![1; FILE_MIB << 20]).expect("room for the file");
    assert_eq!(fs::read(&file).expect("readable").len(), FILE_MIB << 20);
    let agent = Agent::start(&["--window", "2s", "--profiles", "cpu,page_faults"]);
    let left_out = |reason: &str| {
        let name = "profiler_agent_samples_filtered_total";
        agent.metric(&format!("{name}{{type=\"page_faults\",reason=\"{reason}\"}}")).unwrap_or(0.0)
    };
    let files_before = left_out("file_page");
    let file = file.to_str().expect("text");
    let mut grow = Program::start("grow", &[&format!("{TOUCHED_MIB}"), file]);
    let mut touch = || -> SystemTime {
        assert_eq!(grow.ask("go"), "done\n");
        let done = SystemTime::now();
        agent.wait_for_window_after(done);
        done
    };
    // A process has its unwind tables from its first samples on.
    let started = touch();
    touch();

    let selector = format!("{{exe=\"grow\",pid=\"{}\"}}", grow.pid());
    let merged = |column| agent.merge_type(&selector, ("page_faults", column), started);
    let (bytes, faults) = (merged("fault_space"), merged("faults"));
    for (function, mib) in [("touch_memory", TOUCHED_MIB), ("fill_by_kernel", FILLED_MIB)] {
        let truth = mib * MIB;
        for (found, truth) in
            [(bytes.total_of(function) as f64, truth), (faults.total_of(function) as f64, truth / PAGE)]
        {
            eprintln!("{function}: {found} of {truth}");
            assert!((found / truth - 1.0).abs() <= accepted(mib * MIB), "{function}: {found} of {truth}");
        }
        assert!(bytes.has_stack(function, &["main", "_start"]), "unwound without frame pointers: {bytes:?}");
    }
    assert_eq!(bytes.total_of("read_file"), 0, "{bytes:?}");
    // Sixteen pages of a file in memory come with each fault.
    let of_file = left_out("file_page") - files_before;
    assert!(of_file >= 1.0, "{of_file} samples of pages of files");

    let types = String::from_utf8(agent.query("/api/v1/types", &[])).expect("text");
    assert!(types.contains("\"page_faults\"") && types.contains("fault_space"), "{types}");
    let log = agent.stop();
    let account = log.lines().find(|line| line.contains(": page_faults: taken")).expect("an account");
    assert!(account.contains("waiting 0 + dropped 0") && !account.contains("UNACCOUNTED"), "{account}");
}

/// One fault brings 2 MiB, and a sample of it stands for 509 such: a GiB. Their sum is right all the same.
#[test]
#[ignore = "needs root and BPF"]
fn huge_pages_count_as_what_they_add() {
    const HUGE_PAGE: f64 = 2.0 * MIB;
    const REGION_MIB: u32 = 512;
    const TIMES: u32 = 80;
    let agent = Agent::start(&["--window", "2s", "--profiles", "cpu,page_faults"]);
    let mut grow = Program::start("grow", &[&REGION_MIB.to_string()]);
    let mut touch = |times: u32| -> f64 {
        let bytes = grow.ask(&format!("huge {times}")).trim().parse().expect("a number");
        agent.wait_for_window_after(SystemTime::now());
        bytes
    };
    // It has its unwind tables from then on.
    if touch(1) == 0.0 {
        return support::skip("huge_pages_count_as_what_they_add", "this kernel gives none");
    }
    let started = SystemTime::now();
    let truth = touch(TIMES);
    let selector = format!("{{exe=\"grow\",pid=\"{}\"}}", grow.pid());
    let found =
        |column| agent.merge_type(&selector, ("page_faults", column), started).total_of("touch_huge") as f64;
    let samples = truth / HUGE_PAGE / PERIOD;
    let accepted = 4.0 / samples.sqrt();
    for (found, truth) in [(found("fault_space"), truth), (found("faults"), truth / HUGE_PAGE)] {
        eprintln!("{found} of {truth}, {samples:.0} samples, {accepted:.2} accepted");
        assert!((found / truth - 1.0).abs() <= accepted, "{found} of {truth}, {accepted} accepted");
    }
    agent.stop();
}

/// Events of the kernel that a process has open.
fn events_of(pid: u32) -> usize {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).expect("a process that runs");
    let targets = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
    targets.filter(|target| target.to_string_lossy() == "anon_inode:[perf_event]").count()
}

#[test]
#[ignore = "needs root and BPF"]
fn switched_off_no_fault_is_sampled_and_switched_on_they_are_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("agent.toml");
    let write = |text: &str| {
        fs::write(path.with_extension("new"), text).expect("written");
        fs::rename(path.with_extension("new"), &path).expect("renamed");
    };
    // No clock events: what is open are those of page faults.
    let with = |enabled: bool| write(&format!("profiles = [\"page_faults\"]\nenabled = {enabled}\n"));
    with(true);
    let agent = Agent::start(&["--window", "2s", "--config", path.to_str().expect("text")]);
    let wait_for_events = |there: bool| {
        agent.wait_for("page faults are followed or not", || {
            ((events_of(agent.pid()) > 0) == there).then_some(())
        });
    };
    wait_for_events(true);
    let mut grow = Program::start("grow", &["64"]);
    let selector = format!("{{exe=\"grow\",pid=\"{}\"}}", grow.pid());
    with(false);
    wait_for_events(false);
    let taken = || agent.metric("profiler_agent_samples_taken_total{type=\"page_faults\"}").expect("metrics");
    let before = taken();
    assert_eq!(grow.ask("go"), "done\n");
    assert_eq!(taken(), before, "faults of the pause");
    with(true);
    wait_for_events(true);
    let resumed = SystemTime::now();
    agent.wait_for("faults are sampled again", || {
        assert_eq!(grow.ask("go"), "done\n");
        let since = agent.merge_type(&selector, ("page_faults", "faults"), resumed);
        (since.total_of("touch_memory") > 0).then_some(())
    });
    agent.stop();
}

#[test]
#[ignore = "needs root and BPF"]
fn a_target_is_the_only_one_whose_faults_are_taken() {
    let mut wanted = Program::start("grow", &["256"]);
    let mut other = Program::start("grow", &["256"]);
    let pid = wanted.pid().to_string();
    let started = SystemTime::now();
    let agent = Agent::start(&["--window", "2s", "--profiles", "cpu,page_faults", "--pid", &pid]);
    assert_eq!((other.ask("go"), wanted.ask("go")), ("done\n".to_owned(), "done\n".to_owned()));
    let faults = |pid: u32| {
        let selector = format!("{{exe=\"grow\",pid=\"{pid}\"}}");
        agent.merge_type(&selector, ("page_faults", "faults"), started).total_of("touch_memory")
    };
    agent.wait_for("its faults are stored", || (faults(wanted.pid()) > 0).then_some(()));
    assert_eq!(faults(other.pid()), 0, "touched its memory before");
    let filtered = "profiler_agent_samples_filtered_total{type=\"page_faults\",reason=\"target\"}";
    assert!(agent.metric(filtered).is_some_and(|samples| samples >= 1.0));
    let log = agent.stop();
    assert!(log.contains(": page_faults: taken") && !log.contains("UNACCOUNTED"), "{log}");
}
