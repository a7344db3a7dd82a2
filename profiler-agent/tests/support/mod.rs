//! Runs the real agent against the real kernel, and asks the embedded backend what it saw.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

pub mod kernel;
pub mod patience;

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, SystemTime},
};

use serde_json::Value;

/// How long anything may take before a test gives up; never how long it waits when all is well.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long the windows of tests are that look back by them.
pub const WINDOW: Duration = Duration::from_secs(2);

/// A running agent with its backend, on free ports, with a data directory of its own.
pub struct Agent {
    child: Child,
    pub agent: SocketAddr,
    pub backend: SocketAddr,
    pub data_dir: tempfile::TempDir,
    log: PathBuf,
    started: SystemTime,
    client: reqwest::Client,
    runtime: tokio::runtime::Runtime,
}

impl Agent {
    /// Starts the agent and waits until it samples and its backend answers.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_after("", arguments)
    }

    /// The same by a shell in a mount namespace of its own, which runs `commands` first; they end in `&&`.
    pub fn start_after(commands: &str, arguments: &[&str]) -> Self {
        // An error means that another test of this process has installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let data_dir = tempfile::tempdir().expect("a temporary directory");
        let (agent, backend) = (free_address(), free_address());
        let log = data_dir.path().join("agent.log");
        // Where everything takes longer, it would be far behind the programs of a test with its fair share.
        let before_all = if is_emulated() { "nice -n -10" } else { "" };
        let script = format!("{commands} exec {before_all} \"$0\" \"$@\"");
        let child = Command::new("unshare")
            .args(["--mount", "sh", "-c", &script, env!("CARGO_BIN_EXE_profiler-agent")])
            .args(["--listen", &agent.to_string(), "--backend-listen", &backend.to_string()])
            .arg("--data-dir")
            .arg(data_dir.path().join("data"))
            .arg("--run-dir")
            .arg(data_dir.path().join("run"))
            .args(arguments)
            .args(patient(arguments))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).expect("a log file"))
            .spawn()
            .expect("the agent starts");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let client = reqwest::Client::new();
        let started = SystemTime::now();
        let agent = Self { child, agent, backend, data_dir, log, started, client, runtime };
        agent.wait_for("the agent and its backend answer", || {
            let ready = agent.get(agent.agent, "/readyz")?;
            let types = agent.get(agent.backend, "/api/v1/types")?;
            (ready.0 == 200 && types.0 == 200).then_some(())
        });
        agent
    }

    /// Asks until there is an answer, or fails with what the agent has logged.
    pub fn wait_for<T>(&self, what: &str, probe: impl FnMut() -> Option<T>) -> T {
        patience::wait_for(PATIENCE, Duration::from_millis(100), what, || self.log(), probe)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Status and body; `None` while nobody answers.
    pub fn get(&self, address: SocketAddr, path: &str) -> Option<(u16, Vec<u8>)> {
        self.runtime.block_on(async {
            let response = self.client.get(format!("http://{address}{path}")).send().await.ok()?;
            let status = response.status().as_u16();
            Some((status, response.bytes().await.ok()?.to_vec()))
        })
    }

    /// The backend's answer to a query, which must be one.
    pub fn query(&self, path: &str, parameters: &[(&str, &str)]) -> Vec<u8> {
        let mut url = reqwest::Url::parse(&format!("http://{}{path}", self.backend)).expect("a URL");
        url.query_pairs_mut().extend_pairs(parameters);
        let (status, body) = self.get_url(url.clone());
        assert_eq!(status, 200, "{url}: {}", String::from_utf8_lossy(&body));
        body
    }

    fn get_url(&self, url: reqwest::Url) -> (u16, Vec<u8>) {
        self.runtime.block_on(async {
            let response = self.client.get(url).send().await.expect("the backend answers");
            let status = response.status().as_u16();
            (status, response.bytes().await.expect("a whole answer").to_vec())
        })
    }

    /// The merged profile of what a selector selects, by nanoseconds of CPU time.
    pub fn merge(&self, selector: &str) -> Merged {
        let body =
            self.query("/api/v1/merge", &[("query", selector), ("format", "json"), ("max_nodes", "100000")]);
        Merged::parse(&serde_json::from_slice(&body).expect("JSON"))
    }

    /// The merged profile of another type, by one of its sample types, of windows that began after a moment.
    pub fn merge_type(&self, selector: &str, types: (&str, &str), moment: SystemTime) -> Merged {
        let (profile_type, sample_type) = types;
        let what = [
            ("query", selector),
            ("type", profile_type),
            ("sample_type", sample_type),
            ("format", "json"),
            ("max_nodes", "100000"),
        ];
        let body = self.query_since("/api/v1/merge", &what, moment);
        Merged::parse(&serde_json::from_slice(&body).expect("JSON"))
    }

    /// The same of windows that began after a moment.
    pub fn merge_since(&self, selector: &str, moment: SystemTime) -> Merged {
        let what = [("query", selector), ("format", "json"), ("max_nodes", "100000")];
        let body = self.query_since("/api/v1/merge", &what, moment);
        Merged::parse(&serde_json::from_slice(&body).expect("JSON"))
    }

    /// A query of windows that began after a moment.
    fn query_since(&self, path: &str, parameters: &[(&str, &str)], moment: SystemTime) -> Vec<u8> {
        let since_epoch = moment.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
        let to = (since_epoch + Duration::from_secs(3600)).as_millis().to_string();
        let from = since_epoch.as_millis().to_string();
        let range = [("from", from.as_str()), ("to", to.as_str())];
        self.query(path, &[&range[..], parameters].concat())
    }

    /// The same as a pprof profile, which tells inlined calls from frames.
    pub fn pprof_since(&self, selector: &str, moment: SystemTime) -> profiler_pprof::proto::Profile {
        let since_epoch = moment.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
        let to = (since_epoch + Duration::from_secs(3600)).as_millis().to_string();
        let from = since_epoch.as_millis().to_string();
        let what = [("query", selector), ("format", "pprof"), ("from", &from), ("to", &to)];
        let body = self.query("/api/v1/merge", &what);
        profiler_pprof::decode(&body, &profiler_pprof::DecodeLimits::default()).expect("a profile")
    }

    /// The sum of a metric of the agent's over all its labels; `None` while it does not answer.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let (_, body) = self.get(self.agent, "/metrics")?;
        let text = String::from_utf8(body).expect("text");
        let value = |line: &str| -> Option<f64> {
            let behind = line.strip_prefix(name)?;
            let is_whole_name = behind.starts_with([' ', '{']);
            if is_whole_name { behind.rsplit(' ').next()?.parse().ok() } else { None }
        };
        Some(text.lines().filter_map(value).sum())
    }

    /// Waits until a window is stored that began after a moment: then so are all that ended before it.
    pub fn wait_for_window_after(&self, moment: SystemTime) {
        let since_epoch = moment.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
        // One that begins later than this began after the moment.
        let from = since_epoch + WINDOW;
        let to = (from + Duration::from_secs(3600)).as_millis().to_string();
        let from = from.as_millis().to_string();
        self.wait_for("a later window is stored", || {
            let body = self.query("/api/v1/merge", &[("from", &from), ("to", &to), ("format", "json")]);
            let merged = Merged::parse(&serde_json::from_slice(&body).expect("JSON"));
            (merged.total > 0).then_some(())
        });
    }

    /// Waits until the programs that run have their unwind tables.
    pub fn wait_for_tables(&self) {
        self.wait_for("tables of the running programs", || {
            (self.metric("profiler_agent_unwind_scanned")? == 1.0).then_some(())
        });
    }

    /// Waits until a window has left in which no name was late: files are read once for their names, and until then frames
    /// leave as addresses, counted.
    pub fn wait_for_names(&self) {
        let late =
            || self.metric(r#"profiler_agent_symbols_unresolved_total{reason="late"}"#).expect("metrics");
        let start = SystemTime::now();
        loop {
            let (moment, before) = (SystemTime::now(), late());
            self.wait_for_window_after(moment);
            if late() == before {
                let waited = start.elapsed().unwrap_or_default();
                return eprintln!("names after {:.1} s; {before} were late", waited.as_secs_f64());
            }
        }
    }

    /// From when on shares of what a selector selects count: where everything takes longer than a program needs for the
    /// samples of a test, from when a function of it has its name, elsewhere from the beginning.
    pub fn counted_from(&self, selector: &str, function: &str) -> SystemTime {
        if !is_emulated() {
            return self.started;
        }
        self.wait_for(&format!("{function} in {selector}"), || {
            self.merge(selector).mentions(function).then_some(())
        });
        self.wait_for_names();
        SystemTime::now()
    }

    /// The merged profile as a pprof file in the data directory.
    pub fn merge_to_file(&self, selector: &str, name: &str) -> PathBuf {
        self.write(name, &self.query("/api/v1/merge", &[("query", selector), ("format", "pprof")]))
    }

    /// The same of windows that began after a moment.
    pub fn merge_to_file_since(&self, selector: &str, name: &str, moment: SystemTime) -> PathBuf {
        let what = [("query", selector), ("format", "pprof")];
        self.write(name, &self.query_since("/api/v1/merge", &what, moment))
    }

    fn write(&self, name: &str, body: &[u8]) -> PathBuf {
        let path = self.data_dir.path().join(name);
        fs::write(&path, body).expect("write the profile");
        path
    }

    /// Makes it read its file again.
    pub fn hang_up(&self) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        // SAFETY: a signal to a child that has not been waited for: the pid is still its.
        let status = unsafe { libc::kill(pid, libc::SIGHUP) };
        assert_eq!(status, 0, "the agent can be signalled");
    }

    /// Kills the agent, which has no time to clean up.
    pub fn kill(mut self) {
        self.child.kill().expect("the agent is a child of this test");
        self.child.wait().expect("the agent is a child of this test");
    }

    /// Stops the agent as Ctrl-C does and gives its log; it must exit with 0.
    pub fn stop(mut self) -> String {
        interrupt(&self.child);
        let status = self.child.wait().expect("the agent is a child of this test");
        let log = self.log();
        assert!(status.success(), "{status}\n--- agent's log\n{log}");
        log
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have been stopped by the test.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where everything takes longer, names and tables would wait for the agent's share of the CPU longer than a test does.
fn patient(arguments: &[&str]) -> &'static [&'static str] {
    if is_emulated() && !arguments.contains(&"--cpu-budget") { &["--cpu-budget", "off"] } else { &[] }
}

/// Ends a child as Ctrl-C does.
pub fn interrupt(child: &Child) {
    let pid = i32::try_from(child.id()).expect("a pid");
    // SAFETY: a signal to a child that has not been waited for: the pid is still its.
    let status = unsafe { libc::kill(pid, libc::SIGINT) };
    assert_eq!(status, 0, "the agent can be interrupted");
}

/// An address nobody listens on now.
fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound socket has an address")
}

/// A flame graph read back from the backend.
#[derive(Debug)]
pub struct Merged {
    pub total: i64,
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Node {
    name: String,
    total: i64,
    own: i64,
    parent: Option<usize>,
}

impl Merged {
    fn parse(json: &Value) -> Self {
        let names: Vec<String> = serde_json::from_value(json["names"].clone()).expect("names");
        let rows: Vec<i64> = serde_json::from_value(json["rows"].clone()).expect("rows");
        let mut path: Vec<usize> = Vec::new();
        let mut nodes: Vec<Node> = Vec::new();
        for row in rows.chunks_exact(4) {
            let [level, total, own, name] = *row else { unreachable!("chunks of 4") };
            path.truncate(usize::try_from(level).expect("a level"));
            let name = names[usize::try_from(name).expect("an index")].clone();
            nodes.push(Node { name, total, own, parent: path.last().copied() });
            path.push(nodes.len() - 1);
        }
        Self { total: json["total"].as_i64().expect("a total"), nodes }
    }

    /// Share of the total that was spent in a function and what it calls, when called by a certain other.
    pub fn share_below(&self, function: &str, caller: &str) -> f64 {
        let is_called = |node: &&Node| {
            node.name.contains(function)
                && node.parent.is_some_and(|parent| self.nodes[parent].name.contains(caller))
        };
        self.share(self.nodes.iter().filter(is_called).map(|node| node.total).sum())
    }

    /// Share of the total whose outermost frame has one of these names.
    pub fn share_from(&self, roots: &[&str]) -> f64 {
        let is_root = |node: &&Node| node.parent == Some(0) && roots.contains(&node.name.as_str());
        self.share(self.nodes.iter().filter(is_root).map(|node| node.total).sum())
    }

    /// Outermost frames and their values.
    pub fn roots(&self) -> Vec<(&str, i64)> {
        let roots = self.nodes.iter().filter(|node| node.parent == Some(0));
        roots.map(|node| (node.name.as_str(), node.total)).collect()
    }

    /// Whether a function was seen with all of these callers, nearest first, others between them.
    pub fn has_stack(&self, function: &str, callers: &[&str]) -> bool {
        self.nodes.iter().filter(|node| node.name == function).any(|node| {
            let mut above = std::iter::successors(node.parent, |&at| self.nodes[at].parent);
            callers.iter().all(|caller| above.any(|at| self.nodes[at].name == *caller))
        })
    }

    /// The stack with the largest own value, leaf first, inlined calls included.
    pub fn hottest_stack(&self) -> Vec<&str> {
        let hottest = self.nodes.iter().max_by_key(|node| node.own).expect("a node");
        let parent = |node: &&Node| node.parent.map(|parent| &self.nodes[parent]);
        std::iter::successors(Some(hottest), parent).map(|node| node.name.as_str()).collect()
    }

    /// What was counted below a function, which does not call itself.
    pub fn total_of(&self, function: &str) -> i64 {
        self.nodes.iter().filter(|node| node.name == function).map(|node| node.total).sum()
    }

    /// The same where the outermost frame is a certain one.
    pub fn total_from(&self, root: &str, function: &str) -> i64 {
        let is_from_root = |node: &&Node| {
            let ancestors = std::iter::successors(node.parent, |&at| self.nodes[at].parent);
            // The last one stands for the whole, the one below it is the outermost frame.
            let path: Vec<_> = ancestors.collect();
            path.iter().rev().nth(1).is_some_and(|&at| self.nodes[at].name == root)
        };
        let nodes = self.nodes.iter().filter(|node| node.name == function);
        nodes.filter(is_from_root).map(|node| node.total).sum()
    }

    /// Whether any frame has this name.
    pub fn mentions(&self, function: &str) -> bool {
        self.nodes.iter().any(|node| node.name.contains(function))
    }

    fn share(&self, value: i64) -> f64 {
        value as f64 / self.total.max(1) as f64
    }
}

/// A program that runs until its input is closed.
pub struct Program {
    child: Child,
    input: Option<ChildStdin>,
}

impl Program {
    /// Starts one of the test programs and waits until it says that it runs.
    pub fn start(name: &str, arguments: &[&str]) -> Self {
        let path = testprogs().join(name);
        assert!(path.exists(), "{} is not there: run cargo xtask testprogs", path.display());
        Self::start_command(Command::new(path).args(arguments))
    }

    /// Starts a program that says `ready`, and waits until it does.
    pub fn start_command(command: &mut Command) -> Self {
        let name = command.get_program().to_owned();
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let output = child.stdout.as_mut().expect("piped");
        let mut line = String::new();
        BufReader::with_capacity(1, output).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n", "{}", name.display());
        let input = child.stdin.take();
        Self { child, input }
    }

    /// Writes a line to its input.
    pub fn tell(&mut self, line: &str) {
        let input = self.input.as_mut().expect("a program of the tests has one");
        writeln!(input, "{line}").expect("the program reads");
    }

    /// Starts a program of the system that writes nothing.
    pub fn system(name: &str, arguments: &[&str]) -> Self {
        Self::system_command(Command::new(name).args(arguments))
    }

    /// The same of a command.
    pub fn system_command(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self { child: command.spawn().expect("the program starts"), input: None }
    }

    /// Writes a line to its input and waits for one of its output.
    pub fn ask(&mut self, line: &str) -> String {
        let input = self.input.as_mut().expect("its input is open");
        writeln!(input, "{line}").expect("it reads");
        let output = self.child.stdout.as_mut().expect("piped");
        let mut answer = String::new();
        BufReader::with_capacity(1, output).read_line(&mut answer).expect("a line");
        answer
    }

    /// Closes its input and gives what it printed behind `ready`.
    pub fn finish(mut self) -> String {
        self.input = None;
        self.output()
    }

    /// Waits for its own end and gives what it printed behind `ready`.
    pub fn output(mut self) -> String {
        let mut output = String::new();
        if let Some(mut pipe) = self.child.stdout.take() {
            pipe.read_to_string(&mut output).expect("text");
        }
        let status = self.child.wait().expect("a child of this test");
        assert!(status.success(), "{status}");
        output
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where `cargo xtask testprogs` puts what it builds.
pub fn testprogs() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_profiler-agent"))
        .ancestors()
        .find(|directory| directory.ends_with("target"))
        .map_or_else(|| PathBuf::from("../target"), Path::to_path_buf)
        .join("testprogs")
}

/// Ways to probe an allocator's functions, and the kernel that has it first.
pub const HEAP_KINDS: [(&str, (u32, u32)); 3] = [("session", (6, 13)), ("multi", (6, 6)), ("perf", (5, 15))];

/// The first kernel that has one of [`HEAP_KINDS`], or any.
pub fn heap_kind_since(kind: Option<&str>) -> (u32, u32) {
    let kinds = HEAP_KINDS.into_iter().filter(|(name, _)| kind.is_none_or(|kind| kind == *name));
    kinds.map(|(_, since)| since).min().expect("one of them")
}

/// Whether this kernel can profile heaps; the test that is named is skipped where it cannot.
pub fn has_heap_profiles(test: &str) -> bool {
    let since = heap_kind_since(None);
    let has = kernel::version() >= since;
    if !has {
        skip(test, &format!("heaps are profiled from Linux {}.{} on", since.0, since.1));
    }
    has
}

/// Whether this kernel has one of [`HEAP_KINDS`]; what a test does with it is skipped where it does not.
pub fn has_heap_kind(test: &str, kind: &str) -> bool {
    let since = heap_kind_since(Some(kind));
    let has = kernel::version() >= since;
    if !has {
        skip(&format!("{test}: {kind}"), &format!("Linux {}.{} is the first to have it", since.0, since.1));
    }
    has
}

/// Whether this is a machine on which everything takes longer.
pub fn is_emulated() -> bool {
    std::env::var_os("PROFILER_TEST_PATIENCE").is_some()
}

/// Says what is left out, past the capture of test output: `cargo xtask test` counts these lines.
pub fn skip(what: &str, reason: &str) {
    say(&format!("SKIP {what}: {reason}"));
}

/// Prints a line past the capture of test output.
pub fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").expect("standard output is open");
}

/// Runs a tool and gives what it printed; it must succeed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(program).args(arguments).stdin(Stdio::null()).output().expect("the tool is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// The code of the C library as a process has it.
pub fn code_of(pid: u32) -> Vec<u8> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it runs");
    let line =
        maps.lines().find(|line| line.contains("r-xp") && line.contains("libc.so")).expect("it has a libc");
    let range = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
    let hex = |text| u64::from_str_radix(text, 16).expect("an address");
    let (start, end) = (hex(range.0), hex(range.1));
    let memory = fs::File::open(format!("/proc/{pid}/mem")).expect("we are root");
    let mut code = vec![0; usize::try_from(end - start).expect("small")];
    memory.read_exact_at(&mut code, start).expect("it is mapped");
    code
}
