//! The agent as a process: what it says, what it answers and how it ends.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

mod patience;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// How long anything may take before a test gives up; never how long it waits when all is well.
const PATIENCE: Duration = Duration::from_secs(60);

/// The program.
pub const AGENT: &str = env!("CARGO_BIN_EXE_profiler-agent");

/// A running agent, on free ports, with a data directory of its own.
pub struct Spawned {
    child: Child,
    directory: tempfile::TempDir,
}

impl Spawned {
    /// Starts it and waits for nothing.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_with(arguments, &[])
    }

    /// The same with environment variables.
    pub fn start_with(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        Self::start_by(Command::new(AGENT), arguments, variables)
    }

    /// Started by a command that becomes the agent: one that takes its privileges, say.
    pub fn start_by(mut command: Command, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let child = command
            .args(["--listen", "127.0.0.1:0", "--backend-listen", "127.0.0.1:0", "--data-dir"])
            .arg(directory.path().join("data"))
            .arg("--run-dir")
            .arg(directory.path().join("run"))
            .args(arguments)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(directory.path().join("log")).expect("a log file"))
            .spawn()
            .expect("the agent starts");
        Self { child, directory }
    }

    /// A directory of this agent's own; its run directory is `run` below.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What `profiler-agent COMMAND` says of this agent: its exit code, standard output and standard error.
    pub fn command(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let listen = self.address().to_string();
        let output = Command::new(AGENT).args(["--listen", &listen]).args(arguments).output();
        let output = output.expect("it starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// The first line of the log that holds `part`, once there is one.
    pub fn wait_for_line(&self, part: &str) -> String {
        self.wait_for(part, || self.log().lines().find(|line| line.contains(part)).map(str::to_owned))
    }

    /// Asks until there is an answer, or fails with what the agent has logged.
    pub fn wait_for<T>(&self, what: &str, probe: impl FnMut() -> Option<T>) -> T {
        patience::wait_for(PATIENCE, Duration::from_millis(50), what, || self.log(), probe)
    }

    /// Where the agent's own HTTP listens, once it says so.
    pub fn address(&self) -> SocketAddr {
        let line = self.wait_for_line("own metrics: http://");
        let address = line.split("http://").nth(1).and_then(|rest| rest.split('/').next());
        address.and_then(|address| address.parse().ok()).expect("an address in the line")
    }

    /// The value of one line of the agent's metrics; 0 while it is not there.
    pub fn metric(&self, line: &str) -> u64 {
        let metrics = get(self.address(), "/metrics");
        let value = metrics.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok());
        value.unwrap_or(0)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: libc::c_int) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        // SAFETY: a signal to a child that has not been waited for: the pid is still its.
        let status = unsafe { libc::kill(pid, signal) };
        assert_eq!(status, 0, "the agent can be signalled");
    }

    /// Waits for its end: the exit code, and all that it has logged.
    pub fn end(mut self) -> (Option<i32>, String) {
        let end = patience::end_of(PATIENCE);
        loop {
            if let Some(status) = self.child.try_wait().expect("a child of this test") {
                return (status.code(), self.log());
            }
            assert!(Instant::now() < end, "the agent does not end\n--- agent's log\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The answer to one request, head and body; empty when nobody answers.
pub fn get(address: SocketAddr, path: &str) -> String {
    let mut answer = Vec::new();
    if let Ok(mut connection) = TcpStream::connect(address) {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        // A connection that breaks has no answer.
        let _ = connection.write_all(request.as_bytes());
        let _ = connection.read_to_end(&mut answer);
    }
    String::from_utf8_lossy(&answer).into_owned()
}

/// The line with the account of a destination, of an agent that has ended.
#[track_caller]
pub fn account(log: &str) -> &str {
    log.lines().find(|line| line.contains(": taken ")).unwrap_or_else(|| panic!("no account in\n{log}"))
}

/// The number behind a word of an account.
#[track_caller]
pub fn term(account: &str, word: &str) -> u64 {
    let rest = account.split(&format!("{word} ")).nth(1).unwrap_or_default();
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("{word} in {account}"))
}
