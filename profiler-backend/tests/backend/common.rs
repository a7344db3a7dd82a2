//! A backend on a free port, an HTTP client of a few lines, and profiles to push.

use std::{
    collections::HashMap,
    future::Future,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use profiler_backend::{Options, Server};
use profiler_pprof::{
    FrameKind, FunctionSpec, LabelSpec, LineSpec, LocationSpec, MappingSpec, ProfileBuilder, TypeSpec,
    encode,
    push::{self, PushRequest, Temporality},
};
use serde_json::Value;
use tokio::sync::oneshot;

/// A backend in this process, on a free port of 127.0.0.1.
pub(crate) struct Backend {
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    pub(crate) fn start(data_dir: &Path) -> Self {
        Self::start_with(Options::new(data_dir))
    }

    pub(crate) fn start_with(options: Options) -> Self {
        let options = Options { listen: "127.0.0.1:0".parse().expect("an address"), ..options };
        let (stop, stopped) = oneshot::channel::<()>();
        let (bound, address) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().expect("a runtime");
            runtime.block_on(async {
                let server = Server::bind(options).await.expect("bind");
                bound.send(server.local_addr()).expect("the test waits for it");
                server.run(ignore(stopped)).await.expect("run");
            });
        });
        let address = address.recv().expect("the backend binds");
        Self { address, stop: Some(stop), thread: Some(thread) }
    }

    /// Ends the backend as SIGTERM would, and waits for it.
    pub(crate) fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the backend panicked");
        }
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        get(self.address, path)
    }

    /// The JSON answer of a path that must give 200.
    #[track_caller]
    pub(crate) fn json(&self, path: &str) -> Value {
        let response = self.get(path);
        assert_eq!(response.status, 200, "GET {path}: {}", response.text());
        response.json()
    }

    /// The error of a path that must give 400.
    #[track_caller]
    pub(crate) fn error(&self, path: &str) -> String {
        let response = self.get(path);
        assert_eq!(response.status, 400, "GET {path}: {}", response.text());
        response.json()["error"].as_str().expect("an error is a string").to_owned()
    }

    pub(crate) fn push(&self, request: &PushRequest) -> Response {
        push_to(self.address, request)
    }

    /// Pushes one profile of `series`, which must be stored.
    #[track_caller]
    pub(crate) fn store(&self, series: push::Series) {
        let response = self.push(&request(vec![series]));
        assert_eq!((response.status, response.text()), (200, r#"{"stored":1}"#.to_owned()));
    }

    /// Value of a metric, without the prefix `profiler_backend_`.
    #[track_caller]
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let text = self.get("/metrics").text();
        let prefix = format!("profiler_backend_{name} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&prefix));
        value.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().expect("a number")
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.end();
    }
}

async fn ignore(stopped: impl Future<Output = Result<(), oneshot::error::RecvError>>) {
    // A dropped sender is the signal.
    let _ = stopped.await;
}

/// Waits until `holds`, for at most half a minute.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.headers.get("content-type").map(String::as_str), Some("application/json"));
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

pub(crate) fn get(address: SocketAddr, path: &str) -> Response {
    send(address, "GET", path, &[], &[])
}

pub(crate) fn push_to(address: SocketAddr, request: &PushRequest) -> Response {
    let headers = [("Content-Type", "application/x-protobuf")];
    send(address, "POST", "/api/v1/push", &headers, &request.to_bytes())
}

/// One request on a connection of its own. `path` is encoded but for what URLs allow; a `Host` among `headers` replaces
/// the address.
pub(crate) fn send(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Response {
    let mut stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("set a timeout");
    let mut head = format!("{method} {} HTTP/1.1\r\nConnection: close\r\n", encode_path(path));
    if !headers.iter().any(|(name, _)| *name == "Host") {
        head += &format!("Host: {address}\r\n");
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("Content-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).expect("send the head");
    // A server that refuses early closes before it has read everything.
    let _ = stream.write_all(body);
    read_response(stream)
}

fn read_response(stream: TcpStream) -> Response {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).expect("read the status");
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no status in {line:?}"));
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("read a header");
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let mut body = Vec::new();
    reader.read_to_end(&mut body).expect("read the body");
    Response { status, headers, body }
}

fn encode_path(path: &str) -> String {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"/?&=-_.~:%,".contains(byte);
    let bytes = path.bytes();
    bytes
        .map(|byte| if allowed(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// A request with an id no other request of this run has.
pub(crate) fn request(series: Vec<push::Series>) -> PushRequest {
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    let number = u128::from(NUMBER.fetch_add(1, Ordering::Relaxed)) << 64 | u128::from(std::process::id());
    PushRequest {
        format_version: push::FORMAT_VERSION,
        batch_id: number.to_le_bytes().to_vec(),
        agent: "test/1".to_owned(),
        series,
    }
}

/// Now, in Unix milliseconds.
pub(crate) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    i64::try_from(since.as_millis()).expect("before the year 292 million")
}

/// One sample: stack root first, separated by `;`, samples counted, and its labels.
pub(crate) struct Line<'a>(pub(crate) &'a str, pub(crate) i64, pub(crate) &'a [(&'a str, &'a str)]);

/// Nanoseconds that a sample of [`cpu`] stands for.
pub(crate) const PERIOD_NS: i64 = 10_000_000;

/// A 10 s window of type `cpu` that starts `age_ms` ago.
pub(crate) fn cpu(labels: &[(&str, &str)], age_ms: i64, lines: &[Line<'_>]) -> push::Series {
    let types = [TypeSpec::new("samples", "count"), TypeSpec::new("cpu", "nanoseconds")];
    let mut builder = ProfileBuilder::new(&types, types[1], PERIOD_NS);
    builder.comment("rate: 100 Hz");
    for Line(stack, count, labels) in lines {
        add(&mut builder, stack, &[*count, count * PERIOD_NS], labels);
    }
    series(labels, "cpu", Temporality::Delta, age_ms, builder)
}

/// A snapshot of type `heap` taken `age_ms` ago.
pub(crate) fn heap(labels: &[(&str, &str)], age_ms: i64, lines: &[Line<'_>]) -> push::Series {
    let types = [TypeSpec::new("inuse_space", "bytes")];
    let mut builder = ProfileBuilder::new(&types, TypeSpec::new("space", "bytes"), 524_288);
    for Line(stack, bytes, labels) in lines {
        add(&mut builder, stack, &[*bytes], labels);
    }
    series(labels, "heap", Temporality::Snapshot, age_ms, builder)
}

fn add(builder: &mut ProfileBuilder, stack: &str, values: &[i64], labels: &[(&str, &str)]) {
    let mapping = builder.mapping(&MappingSpec {
        start: 0x1000,
        limit: 0x10_0000,
        offset: 0,
        filename: "/usr/bin/app",
        build_id: "abcd",
    });
    let locations: Vec<_> = stack
        .rsplit(';')
        .map(|call| {
            // `outer<inner` is a call of `outer` with `inner` inlined into it.
            let calls: Vec<&str> = call.rsplit('<').collect();
            let lines: Vec<LineSpec<'_>> = calls.iter().map(|name| line(name)).collect();
            let address = 0x2000 + call.bytes().map(u64::from).sum::<u64>();
            let kind = FrameKind::Native;
            let lines: &[LineSpec<'_>] = if call.is_empty() { &[] } else { &lines };
            builder.location(&LocationSpec { mapping: Some(mapping), address, kind, is_folded: false, lines })
        })
        .collect();
    let labels: Vec<LabelSpec<'_>> = labels
        .iter()
        .map(|(name, value)| match (*name, value.parse()) {
            ("pid", Ok(pid)) => LabelSpec::number(name, pid),
            _ => LabelSpec::text(name, value),
        })
        .collect();
    builder.sample(&locations, values, &labels);
}

fn line(name: &str) -> LineSpec<'_> {
    let function = FunctionSpec { name, system_name: name, filename: "app.c", start_line: 7 };
    LineSpec { function, line: 9, column: 0 }
}

fn series(
    labels: &[(&str, &str)],
    profile_type: &str,
    temporality: Temporality,
    age_ms: i64,
    builder: ProfileBuilder,
) -> push::Series {
    push::Series {
        labels: push::labels(labels.iter().copied()),
        profile_type: profile_type.to_owned(),
        temporality: temporality.to_wire(),
        start_unix_ns: (now_ms() - age_ms) * 1_000_000,
        duration_ns: if temporality == Temporality::Delta { 10_000_000_000 } else { 0 },
        pprof: encode(&builder.finish()),
    }
}

/// A tree as `level name total self`, one line a node.
pub(crate) fn tree(merged: &Value) -> Vec<String> {
    let integers: Vec<i64> = merged["rows"]
        .as_array()
        .expect("rows")
        .iter()
        .map(|value| value.as_i64().expect("an integer"))
        .collect();
    let name = |index: i64| merged["names"][index as usize].as_str().expect("a name").to_owned();
    integers.chunks_exact(4).map(|r| format!("{} {} {} {}", r[0], name(r[3]), r[1], r[2])).collect()
}
