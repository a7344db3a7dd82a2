//! Code that a process maps while it runs is known as it is mapped: a library that is loaded late by a program that is soon
//! gone has whole stacks, although nothing of the program was drained before.

mod support;

use std::{process::Command, time::SystemTime};

use support::{Agent, Program, testprogs};

const RUNS: usize = 24;
/// CPU time below the library of each run, in milliseconds. The drain's own interval is 100.
const BRIEF_MS: u64 = 60;
/// Share of the time below the library whose stacks reach the program's start. Without being told of the mapping it is 0:
/// all of a run is drained when it has ended. The first 5 ms (of 60) are the drain's shortest interval, and then the
/// library's table is to be made.
const WHOLE: f64 = 0.25;

#[test]
#[ignore = "needs root and BPF"]
fn a_library_loaded_by_a_program_that_is_soon_gone_has_whole_stacks() {
    let agent = Agent::start(&[
        "-F",
        "999",
        "--cpu-budget",
        "off",
        "--window",
        "2s",
        "--comm",
        "shapes",
        "--comm",
        "burn",
    ]);
    agent.wait_for_tables();
    let cpus = agent.metric("profiler_agent_mapping_event_cpus").expect("metrics");
    assert!(cpus >= 1.0, "new mappings are told on {cpus} CPUs");
    let (program, library) = (testprogs().join("shapes"), testprogs().join("libplugin_1.so"));
    if support::is_emulated() {
        // Files are read once for their names, which takes longer than such a program lives there.
        let mut lasting = Program::start("shapes", &["load", library.to_str().expect("a plain path")]);
        lasting.tell("now");
        agent.wait_for_names();
        drop(lasting);
    }
    for _ in 0..RUNS {
        let mut command = Command::new(&program);
        let status =
            command.arg("brief").arg(&library).arg(BRIEF_MS.to_string()).status().expect("it starts");
        assert!(status.success(), "{status}");
    }
    let ended = SystemTime::now();
    // Windows without samples are not stored: another program fills the later ones.
    let _later = Program::start("burn", &[]);
    agent.wait_for_window_after(ended);

    let merged = agent.merge("{exe=\"shapes\",thread_name=\"shapes\"}");
    let whole_ns = merged.total_from("_start", "plugin_inner_1") as f64;
    let all_ns = (RUNS as u64 * BRIEF_MS * 1_000_000) as f64;
    println!("{:.1} of {:.1} ms below the library reach the start", whole_ns / 1e6, all_ns / 1e6);
    for metric in ["mappings_added", "mappings_deferred", "mapping_events_lost", "first_stacks"] {
        println!("{metric}: {:?}", agent.metric(&format!("profiler_agent_{metric}_total")));
    }
    assert!(whole_ns / all_ns >= WHOLE, "{whole_ns} of {all_ns} ns\n{merged:#?}");
    let added = agent.metric("profiler_agent_mappings_added_total").expect("metrics");
    assert!(added >= RUNS as f64 / 2.0, "{added} mappings were added in {RUNS} runs");
    agent.stop();
}
