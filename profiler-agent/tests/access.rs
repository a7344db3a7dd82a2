//! Who may read and write profiles: an address that a network reaches wants a token, and the agent brings it.

#[path = "support/spawned.rs"]
mod spawned;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use profiler_backend::{Options, Server, Token};
use spawned::{AGENT, Spawned, account, term};
use tokio::{runtime::Runtime, sync::oneshot};

const TOKEN: &str = "hunter2hunter2hunter2";

fn token_file(directory: &Path) -> PathBuf {
    let file = directory.join("token");
    let opened = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&file);
    writeln!(opened.expect("create the token"), "{TOKEN}").expect("write the token");
    file
}

/// Status of the answer to a request with this `Authorization`.
fn status(address: SocketAddr, path: &str, authorization: &str) -> u16 {
    let mut connection = TcpStream::connect(address).expect("it listens");
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: {authorization}\r\nConnection: close\r\n\r\n"
    );
    connection.write_all(request.as_bytes()).expect("it reads");
    let mut answer = Vec::new();
    // A profile is no text.
    let _ = connection.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer);
    answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("{answer:?}"))
}

/// An agent with these arguments ends with 2, says why in one line that holds all of `parts`, and starts nothing.
#[track_caller]
fn refused(arguments: &[&str], parts: &[&str]) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let data = directory.path().join("data");
    let mut command = Command::new(AGENT);
    let output = command.arg("--data-dir").arg(&data).args(arguments).output().expect("it starts");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), message.lines().count()), (Some(2), 1), "{message}");
    for part in parts {
        assert!(message.contains(part), "{message:?} has {part:?}");
    }
    assert!(!message.contains(TOKEN) && !data.exists(), "{message}");
}

#[test]
fn an_open_address_without_a_token_is_refused_in_one_line() {
    refused(&["--backend-listen", "0.0.0.0:0"], &["backend-listen", "\"0.0.0.0:0\"", "--backend-token-file"]);
    refused(&["--backend-listen", "[::]:0"], &["backend-listen", "loopback"]);
    refused(&["--listen", "192.0.2.7:1"], &["listen", "\"192.0.2.7:1\"", "--token-file"]);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = token_file(directory.path());
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("set the mode");
    let path = file.to_str().expect("a plain path");
    for key in ["token-file", "backend-token-file", "upload-token-file"] {
        let flag = format!("--{key}");
        refused(&["--upload", "http://h/", &flag, path], &[key, path, "mode is 644", "mode 600"]);
    }
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("set the mode");
    refused(&["--upload-token-file", path], &["upload-token-file", "with one upload"]);
    refused(&["--upload", "http://a/,http://b/", "--upload-token-file", path], &["one upload", "token_file"]);
    let shown = Command::new(AGENT)
        .args(["--backend-listen", "0.0.0.0:0", "--backend-token-file", path, "--print-config"])
        .output()
        .expect("it starts");
    let text = String::from_utf8_lossy(&shown.stdout);
    assert!(
        shown.status.success() && text.contains("backend_token_file = ") && !text.contains(TOKEN),
        "{text}"
    );
}

#[test]
#[ignore = "needs root and BPF"]
fn the_embedded_backend_wants_its_token_and_the_agent_brings_it() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = token_file(directory.path());
    let path = file.to_str().expect("a plain path");
    let agent = Spawned::start(&["-F", "499", "--window", "1s", "--backend-token-file", path]);
    let line = agent.wait_for_line("flame graphs: http://");
    let address = line.split("http://").nth(1).and_then(|rest| rest.split('/').next()).expect("an address");
    let address: SocketAddr = address.parse().expect("an address");
    let delivered = "profiler_agent_samples_delivered_total{type=\"cpu\"";
    agent.wait_for("a delivery", || {
        let metrics = spawned::get(agent.address(), "/metrics");
        let value = |line: &str| line.strip_prefix(delivered)?.rsplit(' ').next()?.parse::<u64>().ok();
        metrics.lines().filter_map(value).any(|samples| samples > 0).then_some(())
    });
    for path in ["/", "/api/v1/types", "/metrics", "/api/v1/merge?type=cpu&format=pprof"] {
        assert_eq!(status(address, path, ""), 401, "{path}");
        assert_eq!(status(address, path, &format!("Bearer {TOKEN}")), 200, "{path}");
    }
    assert_eq!(status(address, "/healthz", ""), 200);
    // As docs/config.md says: the token as the password of any user.
    let url = format!("http://x:{TOKEN}@{address}/api/v1/merge?type=cpu&format=pprof");
    let mut go = Command::new("go");
    go.args(["tool", "pprof", "-top", "-symbolize=none", &url]).env("PPROF_TMPDIR", directory.path());
    let top = go.output().expect("go is installed");
    let text = String::from_utf8_lossy(&top.stdout);
    assert!(top.status.success() && text.contains("flat%"), "{text}{}", String::from_utf8_lossy(&top.stderr));
    let bundle = agent.directory().join("bundle.tar.gz");
    let bundle = bundle.to_str().expect("a plain path");
    agent.wait_for("samples of the agent itself", || {
        let (code, told, error) =
            agent.command(&["--backend-token-file", path, "support-bundle", "-o", bundle]);
        assert_eq!(code, Some(0), "{error}");
        (!told.contains("profile.pb.gz")).then_some(())
    });
    agent.signal(libc::SIGTERM);
    let (code, log) = agent.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(account(&log).ends_with("waiting 0 + dropped 0") && !log.contains(TOKEN), "{log}");
}

#[test]
#[ignore = "needs root and BPF"]
fn each_destination_is_brought_its_own_token() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = token_file(directory.path());
    let runtime = Runtime::new().expect("a runtime");
    let start = |name: &str, token: Option<Token>| {
        let listen = ([127, 0, 0, 1], 0).into();
        let options = Options { listen, token, ..Options::new(directory.path().join(name)) };
        let server = runtime.block_on(Server::bind(options)).expect("the backend starts");
        let address = server.local_addr();
        let (stop, stopped) = oneshot::channel::<()>();
        let run = async move { server.run(async { drop(stopped.await) }).await.expect("it serves") };
        (address, stop, runtime.spawn(run))
    };
    let token = Token::read(&file).expect("a token");
    let backends = [("open", None), ("closed", Some(token.clone())), ("unknown", Some(token))];
    let [open, closed, unknown] = backends.map(|(name, token)| start(name, token));
    let config = directory.path().join("agent.toml");
    let path = file.display();
    let text = format!(
        "upload = [\"http://{}/\", {{ url = \"http://{}/\", token_file = \"{path}\" }}, \"http://{}/\"]\n",
        open.0, closed.0, unknown.0
    );
    fs::write(&config, text).expect("write the file");
    let config = config.to_str().expect("a plain path");
    let agent = Spawned::start(&["-F", "99", "--window", "1s", "--config", config]);
    let line = agent.wait_for_line("batch refused and dropped");
    assert!(line.contains(&unknown.0.to_string()) && line.contains("401"), "{line}");
    agent.signal(libc::SIGTERM);
    let (code, log) = agent.end();
    assert_eq!(code, Some(0), "{log}");
    let account_of = |address: SocketAddr| {
        let found = log.lines().find(|line| line.contains(&format!("{address}/: cpu: taken ")));
        found.unwrap_or_else(|| panic!("{address} in {log}"))
    };
    for address in [open.0, closed.0] {
        assert!(term(account_of(address), "delivered") > 0, "{log}");
        assert!(account_of(address).ends_with("waiting 0 + dropped 0"), "{log}");
    }
    let account = account_of(unknown.0);
    assert_eq!(
        (term(account, "delivered"), term(account, "refused")),
        (0, term(account, "taken")),
        "{account}"
    );
    assert!(!log.contains(TOKEN), "{log}");
    for (_, stop, task) in [open, closed, unknown] {
        stop.send(()).expect("it runs");
        runtime.block_on(task).expect("it ends");
    }
}
