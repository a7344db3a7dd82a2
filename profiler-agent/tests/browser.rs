//! What a person does: opens the page, chooses a program by its label, sees the hot function.

mod support;

use std::path::Path;

use support::{Agent, Program, run};

#[test]
#[ignore = "needs root and BPF"]
fn the_flame_graph_shows_the_right_function_after_choosing_the_program_by_label() {
    let _program = Program::start("burn", &[]);
    let agent = Agent::start(&["-F", "99", "--window", "2s"]);
    agent.wait_for("enough samples of the program", || {
        (agent.merge("{exe=\"burn\"}").total > 2_000_000_000).then_some(())
    });

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../profiler-backend/ui/test/browser.mjs");
    let script = script.to_str().expect("a plain path");
    let screenshot = agent.data_dir.path().join("page.png");
    let screenshot = screenshot.to_str().expect("a plain path");
    let url = format!("http://{}/", agent.backend);
    run("node", &[script, &url, "hot_loop", "exe=burn", "--screenshot", screenshot]);
    agent.stop();
}
