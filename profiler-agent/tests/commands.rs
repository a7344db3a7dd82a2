//! The commands, the switch, the lock and the reload of a running agent.

#[path = "support/kernel.rs"]
mod kernel;
#[path = "support/spawned.rs"]
mod spawned;

use std::{
    collections::BTreeSet,
    fs,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output, Stdio},
};

use spawned::{AGENT, Spawned, account, get};

const TAKEN: &str = "profiler_agent_samples_taken_total{type=\"cpu\"}";
const SECRET: &str = "hunter2hunter2hunter2";

fn run(arguments: &[&str]) -> Output {
    Command::new(AGENT).args(arguments).output().expect("it starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Waits until samples are taken that were not taken before.
fn wait_for_samples(agent: &Spawned) {
    let before = agent.metric(TAKEN);
    agent.wait_for("new samples", || (agent.metric(TAKEN) > before).then_some(()));
}

fn wait_until_ready(agent: &Spawned, body: &str) {
    agent.wait_for(body, || get(agent.address(), "/readyz").ends_with(body).then_some(()));
}

/// BPF links and perf events that a process holds: what it has attached to the kernel.
fn attached(pid: u32) -> usize {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors").flatten();
    let targets = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    targets.filter(|target| target.to_string_lossy().contains("[perf_event]") || is_link(target)).count()
}

fn is_link(target: &Path) -> bool {
    matches!(
        target.to_str(),
        Some(
            "anon_inode:bpf_link"
                | "anon_inode:[bpf_link]"
                | "anon_inode:bpf-raw-tracepoint"
                | "anon_inode:bpf-raw-tp"
        )
    )
}

#[test]
fn status_without_an_agent_ends_with_1_and_one_line() {
    let output = run(&["--listen", "127.0.0.1:1", "status"]);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.contains("no agent answers at 127.0.0.1:1"), "{message}");
}

#[test]
fn doctor_says_in_its_exit_code_whether_it_works_here() {
    let output = run(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let findings = ["machine", "works"].into_iter().flat_map(|part| report[part].as_array().expect("a list"));
    let is_bad = findings.into_iter().any(|finding| finding["verdict"] == "no");
    assert_eq!(output.status.code(), Some(i32::from(is_bad)), "{report:#}");
}

#[test]
fn doctor_of_a_process_names_the_sources_of_each_mapping() {
    let pid = std::process::id().to_string();
    let output = run(&["doctor", "-p", &pid]);
    let report = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(report.contains("[vdso]") && report.contains("unwinding  .eh_frame"), "{report}");
    let output = run(&["doctor", "-p", "4294967295"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stderr).lines().count(), 1, "{}", text(&output.stderr));
}

#[test]
fn doctor_of_an_interpreter_says_which_switch_names_its_functions() {
    let script = "import time; print(1, flush=True); time.sleep(600)";
    let mut python = Command::new("python3");
    let mut child = python.args(["-c", script]).stdout(Stdio::piped()).spawn().expect("python3 is installed");
    let mut line = [0; 2];
    child.stdout.as_mut().expect("a pipe").read_exact(&mut line).expect("it runs");
    let output = run(&["doctor", "-p", &child.id().to_string()]);
    child.kill().expect("it runs still");
    child.wait().expect("it ends");
    let report = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(report.contains("functions of Python code") && report.contains("python3 -X perf"), "{report}");
}

#[test]
fn print_config_starts_nothing_and_shows_no_secret() {
    let upload = format!("https://user:{SECRET}@h/");
    let output = run(&["--upload", &upload, "-F", "99", "--print-config"]);
    let shown = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(
        shown.contains("frequency = 99  # flag") && shown.contains("window = \"10s\"  # default"),
        "{shown}"
    );
    assert!(!shown.contains(SECRET) && !text(&output.stderr).contains(SECRET), "{shown}");
}

#[test]
#[ignore = "needs root and BPF"]
fn the_off_file_detaches_everything_and_keeps_readiness() {
    let agent = Spawned::start(&["-F", "99", "--window", "1s"]);
    wait_for_samples(&agent);
    assert!(attached(agent.pid()) > 1, "a clock event and a tracepoint at least");
    let off = agent.directory().join("run/off");
    fs::write(&off, "").expect("write the switch");
    wait_until_ready(&agent, &format!("paused: {} exists\n", off.display()));
    assert_eq!(attached(agent.pid()), 0);
    assert!(get(agent.address(), "/readyz").starts_with("HTTP/1.1 200 "));
    assert_eq!(agent.metric("profiler_agent_paused"), 1);
    let (code, status, _) = agent.command(&["status"]);
    assert!(code == Some(0) && status.starts_with("paused: "), "{status}");
    let taken = agent.metric(TAKEN);
    fs::remove_file(&off).expect("remove the switch");
    wait_until_ready(&agent, "sampling\n");
    wait_for_samples(&agent);
    assert!(agent.metric(TAKEN) > taken && agent.metric("profiler_agent_paused") == 0);
    agent.signal(libc::SIGTERM);
    let (code, log) = agent.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(account(&log).ends_with("waiting 0 + dropped 0"), "{log}");
}

#[test]
#[ignore = "needs root and BPF"]
fn a_changed_file_takes_effect_and_a_bad_one_does_not() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("agent.toml");
    fs::write(&file, "enabled = false\n").expect("write the file");
    let agent = Spawned::start(&["--config", file.to_str().expect("a plain path")]);
    wait_until_ready(&agent, "paused: enabled = false\n");
    assert_eq!((attached(agent.pid()), agent.metric(TAKEN)), (0, 0));

    fs::write(&file, "enabled = tru\n").expect("write the file");
    agent.wait_for_line("the new configuration is refused, the old one stays: config");
    wait_until_ready(&agent, "paused: enabled = false\n");

    let next = directory.path().join("next");
    fs::write(&next, "node = \"another\"\nlabels = { team = \"db\" }\n").expect("write the file");
    fs::rename(&next, &file).expect("replace the file");
    wait_until_ready(&agent, "sampling\n");
    agent.wait_for_line("labels is changed");
    wait_for_samples(&agent);

    fs::write(&file, "window = \"3s\"\nnode = \"another\"\n").expect("write");
    agent.signal(libc::SIGHUP);
    agent.wait_for_line("window has another value now, which takes effect with a restart");
    let reloads =
        |result| agent.metric(&format!("profiler_agent_config_reloads_total{{result=\"{result}\"}}"));
    assert!(reloads("accepted") >= 2 && reloads("refused") == 1, "{}", agent.log());
    agent.signal(libc::SIGTERM);
    assert_eq!(agent.end().0, Some(0));
}

#[test]
#[ignore = "needs root and BPF"]
fn a_second_agent_says_so_once_and_waits_until_the_first_one_ends() {
    let first = Spawned::start(&[]);
    wait_until_ready(&first, "sampling\n");
    let run_dir = first.directory().join("run");
    let second = Spawned::start(&["--run-dir", run_dir.to_str().expect("a plain path")]);
    let line = second.wait_for_line("another agent");
    assert!(line.contains(&format!("(pid {})", first.pid())), "{line}");
    assert!(get(second.address(), "/readyz").starts_with("HTTP/1.1 503 "));
    let other = Spawned::start(&["--run-dir", run_dir.to_str().expect("a plain path"), "--instance", "b"]);
    wait_until_ready(&other, "sampling\n");
    first.signal(libc::SIGTERM);
    first.wait_for_line("taken ");
    wait_until_ready(&second, "sampling\n");
    assert_eq!(second.log().matches("another agent").count(), 1, "{}", second.log());
    second.signal(libc::SIGTERM);
    assert_eq!(second.end().0, Some(0));
}

#[test]
#[ignore = "needs root and BPF"]
fn a_support_bundle_has_everything_and_no_secret() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("agent.toml");
    let token = directory.path().join("token");
    fs::write(&token, SECRET).expect("write the token");
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).expect("set the mode");
    let upload = format!("upload = [\"http://user:{SECRET}@127.0.0.1:1/?token={SECRET}\"]\n");
    let text = format!("{upload}token_file = \"{}\"\n", token.display());
    fs::write(&file, text).expect("write the file");
    let config = file.to_str().expect("a plain path").to_owned();
    let agent = Spawned::start(&["-F", "99", "--window", "1s", "--config", &config]);
    agent.wait_for_line("upload failed");
    let bundle = directory.path().join("bundle.tar.gz");
    let path = bundle.to_str().expect("a plain path");
    let (code, told, error) = agent.command(&["--config", &config, "support-bundle", "-o", path]);
    assert_eq!(code, Some(0), "{error}");
    assert!(told.contains("left out: profile.pb.gz: the agent keeps no profiles"), "{told}");

    let parts = unpack(&bundle);
    let part = |name: &str| {
        let part = parts.iter().find(|(path, _)| path == &format!("profiler-support/{name}"));
        &part
            .unwrap_or_else(|| {
                panic!("{name} in {:?}", parts.iter().map(|(path, _)| path).collect::<Vec<_>>())
            })
            .1
    };
    assert!(part("doctor.txt").contains("what works"));
    assert!(part("config.toml").contains("upload = [\"http://127.0.0.1:1/\"]"), "{}", part("config.toml"));
    assert!(part("config-running.toml").contains("frequency = 99  # flag"));
    assert!(part("status.json").contains("\"state\":\"sampling\""), "{}", part("status.json"));
    assert!(part("metrics.txt").contains(TAKEN));
    assert!(part("targets.json").contains("\"frequency_hz\":99"), "{}", part("targets.json"));
    assert!(part("binaries.json").starts_with('['), "{}", part("binaries.json"));
    assert!(
        part("bpf.txt").contains("prog_type 7 ") && part("bpf.txt").contains("map_type 27 "),
        "{}",
        part("bpf.txt")
    );
    assert!(part("logs.txt").contains("upload failed"), "{}", part("logs.txt"));
    for (name, text) in &parts {
        assert!(!text.contains(SECRET), "{name}: {text}");
    }
    assert!(!agent.log().contains(SECRET));
}

/// Names and texts of the files in a tar.
fn unpack(bundle: &Path) -> Vec<(String, String)> {
    let file = fs::File::open(bundle).expect("it was written");
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(file));
    let entries = archive.entries().expect("a tar");
    let read = |entry: std::io::Result<tar::Entry<'_, _>>| {
        let mut entry: tar::Entry<'_, flate2::read::GzDecoder<fs::File>> = entry.expect("an entry");
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).expect("its bytes");
        (entry.path().expect("its name").display().to_string(), text(&bytes))
    };
    entries.map(read).collect()
}

#[test]
#[ignore = "needs root and BPF"]
fn a_support_bundle_holds_the_agents_own_profile_where_there_is_a_backend() {
    let agent = Spawned::start(&["-F", "997", "--window", "1s"]);
    let bundle = agent.directory().join("bundle.tar.gz");
    agent.wait_for("samples of the agent itself", || {
        let path = bundle.to_str().expect("a plain path");
        let (code, told, error) = agent.command(&["support-bundle", "-o", path]);
        assert_eq!(code, Some(0), "{error}");
        (!told.contains("profile.pb.gz")).then_some(())
    });
    assert!(unpack(&bundle).iter().any(|(name, _)| name == "profiler-support/profile.pb.gz"));
}

/// Starts the agent as the user root, with these capabilities and no others, in a mount namespace prepared by a script.
fn reduced(capabilities: &str, script: &str) -> Spawned {
    let mut command = Command::new("unshare");
    let drop = format!(
        "{script} exec setpriv --inh-caps=-all --bounding-set=-all,{capabilities} \
         prlimit {} \"$@\"",
        kernel::locked_memory()
    );
    command.args(["--mount", "--propagation", "private", "sh", "-c", &drop, "sh", AGENT]);
    Spawned::start_by(command, &["-F", "99", "--window", "1s"], &[])
}

const LEAST: &str = "+bpf,+perfmon";
const ALL_USED: &str = "+bpf,+perfmon,+sys_ptrace,+dac_read_search,+checkpoint_restore,+syslog";

#[test]
#[ignore = "needs root and BPF"]
fn it_samples_with_few_capabilities_little_locked_memory_no_tracefs_and_no_modules_file() {
    // tracefs and debugfs are hidden, kprobes cannot be made, /proc/modules is not there.
    let script = "mount -t tmpfs none /sys/kernel/debug; mount -t tmpfs none /sys/kernel/tracing; \
                  mount --bind /dev/null /proc/modules;";
    let agent = reduced(ALL_USED, script);
    wait_for_samples(&agent);
    agent.signal(libc::SIGTERM);
    let (code, log) = agent.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(account(&log).ends_with("waiting 0 + dropped 0"), "{log}");
    assert!(!log.contains(" WARN ") && !log.contains(" ERROR "), "{log}");
}

#[test]
#[ignore = "needs root and BPF"]
fn with_the_least_capabilities_it_samples_and_says_what_it_lacks() {
    let agent = reduced(LEAST, "");
    wait_for_samples(&agent);
    for lack in ["CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_CHECKPOINT_RESTORE", "CAP_SYSLOG"] {
        assert_eq!(agent.log().matches(lack).count(), 1, "{lack}\n{}", agent.log());
    }
    agent.signal(libc::SIGTERM);
    assert_eq!(agent.end().0, Some(0));
}

#[test]
#[ignore = "needs root and BPF"]
fn without_a_needed_capability_it_ends_with_1_and_names_it() {
    let agent = reduced("+perfmon,+sys_ptrace", "");
    let (code, log) = agent.end();
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("CAP_BPF") && log.lines().count() == 1, "{log}");
}

#[test]
#[ignore = "needs root and BPF"]
fn every_metric_is_documented_and_every_documented_metric_is_there() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let document = fs::read_to_string(path).expect("it is in the tree");
    let documented: BTreeSet<_> = document
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "))
        .map(|(name, rest)| (name, rest.split(' ').next().unwrap_or_default()))
        .collect();
    let agent = Spawned::start(&[]);
    wait_until_ready(&agent, "sampling\n");
    let metrics = get(agent.address(), "/metrics");
    let there: BTreeSet<_> =
        metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    let difference: Vec<_> = documented.symmetric_difference(&there).collect();
    assert!(difference.is_empty(), "in one of both only: {difference:?}");
}

#[test]
#[ignore = "needs root and BPF"]
fn the_second_listener_serves_metrics_and_health_only() {
    let agent = Spawned::start(&["--metrics-listen", "127.0.0.1:0"]);
    let line = agent.wait_for_line("metrics and health only: http://");
    let address = line.split("http://").nth(1).and_then(|rest| rest.split('/').next()).expect("an address");
    let address = address.parse().expect("an address");
    wait_until_ready(&agent, "sampling\n");
    assert!(get(address, "/metrics").contains(TAKEN));
    assert!(get(address, "/status").starts_with("HTTP/1.1 404 "));
}
