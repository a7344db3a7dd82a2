//! What becomes of samples while the backend is away, or is none.

#[path = "support/spawned.rs"]
mod spawned;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    path::Path,
    thread,
};

use profiler_backend::{Options, Server};
use spawned::{Spawned, account, get, term};
use tokio::{runtime::Runtime, sync::oneshot, task::JoinHandle};

/// A remote backend, in this process.
struct Backend {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Backend {
    fn start(runtime: &Runtime, listen: SocketAddr, data_dir: &Path) -> Self {
        let options = Options { listen, ..Options::new(data_dir) };
        let server = runtime.block_on(Server::bind(options)).expect("the backend starts");
        let address = server.local_addr();
        let (stop, stopped) = oneshot::channel();
        let run = async move { server.run(async { drop(stopped.await) }).await.expect("it serves") };
        Self { address, stop, task: runtime.spawn(run) }
    }

    fn stop(self, runtime: &Runtime) {
        self.stop.send(()).expect("it runs");
        runtime.block_on(self.task).expect("it ends");
    }

    /// All samples it has, of any series.
    fn samples(&self) -> u64 {
        let answer = get(self.address, "/api/v1/merge?type=cpu&sample_type=samples&format=json");
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let start = body.find('{').expect("an object");
        let mut values = serde_json::Deserializer::from_str(&body[start..]).into_iter::<serde_json::Value>();
        let merged = values.next().expect("a value").expect("JSON");
        merged["total"].as_u64().unwrap_or_else(|| panic!("no total in {answer}"))
    }
}

#[test]
#[ignore = "needs root and BPF"]
fn nothing_is_lost_while_the_backend_is_away() {
    let runtime = Runtime::new().expect("a runtime");
    let data_dir = tempfile::tempdir().expect("a temporary directory");
    let backend = Backend::start(&runtime, ([127, 0, 0, 1], 0).into(), data_dir.path());
    let address = backend.address;
    let url = format!("http://{address}/");
    let agent = Spawned::start(&["-F", "99", "--window", "1s", "--upload", &url]);
    let delivered = || {
        agent.metric(&format!("profiler_agent_samples_delivered_total{{type=\"cpu\",destination={url:?}}}"))
    };
    agent.wait_for("a delivery", || (delivered() > 0).then_some(()));

    backend.stop(&runtime);
    agent.wait_for_line("upload failed");
    // The windows of 5 s at least: each has a batch of its own.
    let mut sizes = std::collections::BTreeSet::new();
    agent.wait_for("five windows more wait", || {
        sizes.insert(agent.metric(&format!("profiler_agent_upload_queue_bytes{{destination={url:?}}}")));
        (sizes.len() > 5).then_some(())
    });

    let backend = Backend::start(&runtime, address, data_dir.path());
    agent.wait_for_line("uploads go through again");
    agent.signal(libc::SIGTERM);
    let (code, log) = agent.end();
    let account = account(&log);
    assert_eq!(code, Some(0), "{log}");
    assert!(account.ends_with("waiting 0 + dropped 0"), "{account}");
    assert_eq!(term(account, "taken"), term(account, "delivered"), "{account}");
    assert_eq!(backend.samples(), term(account, "delivered"), "what is stored is what was delivered");
    backend.stop(&runtime);
}

/// Answers every push with a redirect, and everything else with a page, as a login in front of a backend does.
fn serve_login(listener: &TcpListener) {
    for connection in listener.incoming() {
        let Ok(mut connection) = connection else { return };
        let mut request = Vec::new();
        let mut chunk = [0; 4096];
        // The whole request, so that closing does not reset the connection: its head says how long it is.
        while !is_whole(&request) {
            match connection.read(&mut chunk) {
                Ok(0) | Err(_) => break,
                Ok(bytes) => request.extend_from_slice(&chunk[..bytes]),
            }
        }
        let answer = if request.starts_with(b"POST ") {
            "HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        } else {
            "HTTP/1.1 200 OK\r\nContent-Length: 13\r\nConnection: close\r\n\r\nplease log in"
        };
        // The agent may be gone.
        let _ = connection.write_all(answer.as_bytes());
    }
}

fn is_whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request).to_lowercase();
    let Some((head, _)) = text.split_once("\r\n\r\n") else { return false };
    let body = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
    let head_bytes = request.windows(4).position(|bytes| bytes == b"\r\n\r\n").map_or(0, |at| at + 4);
    request.len() >= head_bytes + body.unwrap_or(0)
}

#[test]
#[ignore = "needs root and BPF"]
fn a_server_that_redirects_to_a_login_has_nothing_delivered_to_it() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound socket has an address");
    thread::spawn(move || serve_login(&listener));
    let agent = Spawned::start(&["-F", "99", "--window", "1s", "--upload", &format!("http://{address}/")]);
    agent.wait_for_line("batch refused and dropped");
    agent.signal(libc::SIGTERM);
    let (code, log) = agent.end();
    let account = account(&log);
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(term(account, "delivered"), 0, "{account}");
    assert_eq!(term(account, "taken"), term(account, "refused"), "{account}");
}
