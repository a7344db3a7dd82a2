//! How the agent is started and stopped: bad values, signals, addresses.

#[path = "support/spawned.rs"]
mod spawned;

use std::{net::TcpListener, process::Command};

use spawned::{Spawned, account, get, term};

/// An agent with these arguments ends with 2 and says why in one line that holds all of `parts`.
#[track_caller]
fn refused(arguments: &[&str], parts: &[&str]) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_profiler-agent")).args(arguments).output().expect("it starts");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    for part in parts {
        assert!(message.contains(part), "{message:?} has {part:?}");
    }
    assert!(!message.contains("secret"), "{message}");
}

#[test]
fn a_bad_value_ends_with_2_and_one_line_that_names_key_value_and_what_is_accepted() {
    refused(&["-F", "0"], &["frequency", "\"0\"", "1 to 1000"]);
    refused(&["-F", "often"], &["frequency", "\"often\"", "1 to 1000"]);
    refused(&["--window", "1h"], &["window", "\"1h\"", "1s to 10m"]);
    refused(&["--listen", "here"], &["listen", "\"here\"", "127.0.0.1:7700"]);
    refused(&["--label", "comm=x"], &["label", "\"comm=x\"", "not pid, comm or thread_name"]);
    refused(&["--upload", "ftp://user:secret@h/?token=secret"], &["upload", "ftp://***@h/", "http://HOST"]);
    refused(&["--config", "/nowhere.toml"], &["config", "/nowhere.toml", "TOML"]);
}

#[test]
fn the_help_does_not_show_the_credentials_in_the_environment() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_profiler-agent"));
    let output = command.arg("--help").env("PROFILER_UPLOAD", "https://user:hunter2@h/").output();
    let help = String::from_utf8_lossy(&output.expect("it starts").stdout).into_owned();
    assert!(help.contains("PROFILER_UPLOAD") && !help.contains("hunter2"), "{help}");
}

#[test]
#[ignore = "needs root and BPF"]
fn sigterm_flushes_the_open_window_and_ends_with_0() {
    // The first windows end after 1 s and 5 s, the next after 10 minutes: one is open whenever the signal comes.
    let agent = Spawned::start(&["-F", "99", "--window", "600s"]);
    agent.wait_for("samples in the last window", || {
        let in_window = agent.metric("profiler_agent_samples_waiting{type=\"cpu\",place=\"window\"}");
        (in_window > 0).then_some(())
    });
    agent.signal(libc::SIGTERM);
    let (code, log) = agent.end();
    let account = account(&log);
    assert_eq!(code, Some(0), "{log}");
    assert!(term(account, "delivered") > 0, "{account}");
    assert!(account.ends_with("waiting 0 + dropped 0"), "{account}");
    assert_eq!(term(account, "taken"), term(account, "delivered"), "{account}");
}

#[test]
#[ignore = "needs root and BPF"]
fn a_second_interrupt_ends_at_once_with_130_and_says_so() {
    // It takes connections and never answers, so that the flush lasts.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = silent.local_addr().expect("a bound socket has an address");
    let agent = Spawned::start(&["-F", "99", "--window", "1s", "--upload", &format!("http://{address}/")]);
    agent.wait_for("a batch that waits", || {
        let name = format!("profiler_agent_upload_queue_bytes{{destination=\"http://{address}/\"}}");
        (agent.metric(&name) > 0).then_some(())
    });
    agent.signal(libc::SIGINT);
    agent.wait_for_line("flushing the open window");
    agent.signal(libc::SIGINT);
    let (code, log) = agent.end();
    assert_eq!(code, Some(130), "{log}");
    assert!(log.contains("exiting at once"), "{log}");
}

#[test]
#[ignore = "needs root and BPF"]
fn port_0_is_told_as_the_port_that_was_taken_and_answers() {
    let agent = Spawned::start(&[]);
    let address = agent.address();
    assert_ne!(address.port(), 0);
    agent.wait_for("it is ready", || get(address, "/readyz").starts_with("HTTP/1.1 200 ").then_some(()));
    agent.signal(libc::SIGINT);
    assert_eq!(agent.end().0, Some(0));
}

#[test]
#[ignore = "needs root and BPF"]
fn a_proxy_in_the_environment_is_not_asked_for_the_embedded_backend() {
    let dead_proxy = [("http_proxy", "http://127.0.0.1:1"), ("HTTP_PROXY", "http://127.0.0.1:1")];
    let agent = Spawned::start_with(&["-F", "99", "--window", "1s"], &dead_proxy);
    agent.wait_for("samples", || {
        (agent.metric("profiler_agent_samples_taken_total{type=\"cpu\"}") > 0).then_some(())
    });
    agent.signal(libc::SIGINT);
    let (code, log) = agent.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(account(&log).ends_with("waiting 0 + dropped 0"), "{log}");
    assert!(term(account(&log), "delivered") > 0, "{log}");
}

/// A cgroup of a test's own that limits memory, in the hierarchy that does; removed at the end.
struct MemoryCgroup(std::path::PathBuf);

impl MemoryCgroup {
    fn new(limit_bytes: u64) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts of this process");
        let limits = |line: &str| {
            let fields: Vec<_> = line.split(' ').collect();
            let [_, at, kind, options, ..] = fields[..] else { return None };
            let is_v1 = kind == "cgroup" && options.split(',').any(|option| option == "memory");
            let file = if is_v1 { "memory.limit_in_bytes" } else { "memory.max" };
            (is_v1 || kind == "cgroup2").then(|| (std::path::PathBuf::from(at), file))
        };
        let cgroups = mounts.lines().filter_map(limits).map(|(mount, file)| {
            let cgroup = mount.join(format!("profiler-memory-{}", std::process::id()));
            std::fs::create_dir(&cgroup).expect("a cgroup can be created");
            (Self(cgroup), file)
        });
        let has_limit = |(cgroup, file): &(Self, &str)| cgroup.0.join(file).exists();
        let (cgroup, file) = cgroups.into_iter().find(has_limit).expect("a hierarchy that limits memory");
        std::fs::write(cgroup.0.join(file), limit_bytes.to_string()).expect("a limit can be set");
        cgroup
    }

    /// Runs an agent in it that is expected to end at once; gives its exit code and what it says.
    fn run(&self, arguments: &str) -> (Option<i32>, String) {
        let (procs, agent) = (self.0.join("cgroup.procs"), env!("CARGO_BIN_EXE_profiler-agent"));
        let script = format!("echo $$ >'{}' && exec '{agent}' {arguments}", procs.display());
        let output = Command::new("sh").args(["-c", &script]).output().expect("a shell");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        // Fails while something runs in it, which the test has waited for.
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
#[ignore = "needs root and BPF"]
fn the_memory_limit_is_that_of_the_own_cgroup_unless_it_is_given() {
    let cgroup = MemoryCgroup::new(50 << 20);
    let (code, message) = cgroup.run("");
    assert_eq!(code, Some(2), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    for part in ["memory-limit", "45MiB (90% of the limit of the agent's cgroup)", "64MiB and more"] {
        assert!(message.contains(part), "{message:?} has {part:?}");
    }
    let (code, message) = cgroup.run("--memory-limit 64MiB --print-config");
    assert_eq!(code, Some(0), "{message}");
}

#[test]
#[ignore = "needs root and BPF"]
fn page_faults_are_sampled_where_they_are_wanted_on_every_kernel() {
    let agent = Spawned::start(&["-F", "19", "--window", "600s", "--profiles", "cpu,page_faults"]);
    let mut grown = Vec::new();
    agent.wait_for("page faults in the window", || {
        // A fault of a file's page is taken and left out later: what is in the window has been looked at.
        let in_window = agent.metric("profiler_agent_samples_waiting{type=\"page_faults\",place=\"window\"}");
        if in_window == 0 {
            grown.push(vec![1_u8; 256 << 10]);
        }
        (in_window > 0).then_some(())
    });
    agent.signal(libc::SIGTERM);
    let (code, log) = agent.end();
    assert_eq!(code, Some(0), "{log}");
    let account = log.lines().find(|line| line.contains(": page_faults: taken"));
    let account = account.unwrap_or_else(|| panic!("no account of page faults\n--- agent's log\n{log}"));
    assert!(term(account, "delivered") > 0, "{account}");
    assert!(account.ends_with("waiting 0 + dropped 0"), "{account}");
}
