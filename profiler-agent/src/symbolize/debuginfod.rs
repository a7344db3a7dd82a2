//! Debug information from servers, where the operator has named some: asked for by build id, one file at a time, by a
//! thread of its own. Nobody waits for it.
//!
//! Source: elfutils, debuginfod(8), "WEBAPI".

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use reqwest::{Client, StatusCode, Url, redirect::Policy};
use tokio::runtime;
use tokio::sync::{mpsc, watch};
use tracing::debug;

use super::debug_store::{DebugStore, Found, Incoming, TakeError};
use super::queue::Queue;
use super::store::StoreError;
use crate::executable::{BuildId, Executable};
use crate::export::is_loopback;

/// Largest file that is taken.
const FILE_BYTES_MAX: u64 = 512 << 20;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A server that sends nothing for so long is down. Some make the file when they are asked.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// One file, from one server.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(600);

/// A build id for which a server failed is not asked for again before.
const RETRY_AFTER: Duration = Duration::from_secs(600);

/// Build ids that wait to be asked for.
const WAITING_MAX: usize = 64;

/// Build ids that wait, or that servers failed for lately.
const REQUESTS_MAX: usize = 1024;

/// Executables with one build id that are told when its file is there; others find it when they are read next.
const TOLD_MAX: usize = 8;

/// What became of build ids since the start.
#[derive(Debug, Default)]
pub(crate) struct DebugInfodCounts {
    /// Debug files that are there now.
    pub(crate) fetched: AtomicU64,
    /// No server has it.
    pub(crate) absent: AtomicU64,
    /// Answers that are too large, of another build id, or lead to other files.
    pub(crate) refused: AtomicU64,
    /// A server was not reached or broke off, or the file could not be kept.
    pub(crate) failed: AtomicU64,
    /// Not asked for, since too many others waited.
    pub(crate) dropped: AtomicU64,
    /// Bytes of files received, also of those that were refused.
    pub(crate) received_bytes: AtomicU64,
}

/// How servers answered for one build id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Fetched,
    Absent,
    Refused,
    Failed,
}

/// What goes on for a build id.
#[derive(Debug)]
enum Request {
    /// For these executables.
    Waiting(Vec<Weak<Executable>>),
    Failed(Instant),
}

/// The servers and what they gave.
#[derive(Debug)]
pub(crate) struct DebugInfod {
    /// Base addresses, in the order in which they are asked, and how each is reached.
    servers: Vec<(Url, Client)>,
    store: DebugStore,
    file_bytes_max: u64,
    requests: Mutex<HashMap<BuildId, Request>>,
    sender: mpsc::Sender<BuildId>,
    is_closed: watch::Sender<bool>,
    counts: DebugInfodCounts,
}

/// Why there is no debug information from servers.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DebugInfodError {
    #[error("open the directory of debug files")]
    Store(#[from] StoreError),
    #[error("make an HTTP client")]
    Client(#[from] reqwest::Error),
}

/// What the thread that asks servers works with.
pub(crate) struct Fetcher {
    debuginfod: Arc<DebugInfod>,
    receiver: mpsc::Receiver<BuildId>,
    runtime: runtime::Handle,
}

impl DebugInfod {
    /// Servers by their base addresses; what they give is kept in `directory`.
    ///
    /// # Errors
    /// See [`DebugInfodError`].
    pub(crate) fn open(
        urls: &[Url],
        directory: PathBuf,
        runtime: runtime::Handle,
    ) -> Result<Fetcher, DebugInfodError> {
        let servers =
            urls.iter().map(|url| Ok((url.clone(), client(url)?))).collect::<reqwest::Result<_>>()?;
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        let debuginfod = Self {
            servers,
            store: DebugStore::open(directory)?,
            file_bytes_max: FILE_BYTES_MAX,
            requests: Mutex::default(),
            sender,
            is_closed: watch::Sender::new(false),
            counts: DebugInfodCounts::default(),
        };
        Ok(Fetcher { debuginfod: Arc::new(debuginfod), receiver, runtime })
    }

    pub(crate) fn counts(&self) -> &DebugInfodCounts {
        &self.counts
    }

    /// Bytes of debug files that are kept, and how many made room for others.
    pub(crate) fn stored(&self) -> (u64, u64) {
        (self.store.bytes(), self.store.evicted())
    }

    /// The debug file of an executable, if it is there; else it is asked for, and `Queue::reload` called when it is. Reads
    /// the disk, never the network.
    pub(super) fn find(&self, executable: &Arc<Executable>) -> Option<File> {
        let build_id = executable.identity().build_ids.gnu.as_ref()?;
        match self.store.find(build_id) {
            Found::File(file) => Some(file),
            Found::Absent => None,
            Found::Unknown => {
                self.ask(build_id, executable);
                None
            }
        }
    }

    fn ask(&self, build_id: &BuildId, executable: &Arc<Executable>) {
        let mut requests = self.requests();
        match requests.get_mut(build_id) {
            Some(Request::Waiting(told)) => {
                if told.len() < TOLD_MAX {
                    told.push(Arc::downgrade(executable));
                }
                return;
            }
            Some(Request::Failed(at)) if at.elapsed() < RETRY_AFTER => return,
            _ => {}
        }
        if requests.len() >= REQUESTS_MAX {
            requests
                .retain(|_, request| !matches!(request, Request::Failed(at) if at.elapsed() >= RETRY_AFTER));
        }
        let has_room = requests.len() < REQUESTS_MAX;
        if has_room && self.sender.try_send(build_id.clone()).is_ok() {
            requests.insert(build_id.clone(), Request::Waiting(vec![Arc::downgrade(executable)]));
        } else {
            self.counts.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Ends the thread; a file that is being received is given up.
    pub(super) fn close(&self) {
        self.is_closed.send_replace(true);
    }

    /// Asks the servers in turn. What one has not, or what it has that is of no use, another may have.
    async fn fetch(&self, build_id: &BuildId) -> Outcome {
        // It may have come between the look at the store and the question.
        if matches!(self.store.find(build_id), Found::File(_)) {
            return Outcome::Fetched;
        }
        let mut worst = Outcome::Absent;
        for (url, client) in &self.servers {
            match self.fetch_from(client, url, build_id).await {
                Ok(Outcome::Fetched) => return Outcome::Fetched,
                Ok(outcome) if worst != Outcome::Failed && outcome != Outcome::Absent => worst = outcome,
                Ok(_) => {}
                Err(error) => {
                    debug!(server = %url, %build_id, %error, "debug information");
                    worst = Outcome::Failed;
                }
            }
        }
        if matches!(worst, Outcome::Absent | Outcome::Refused) && self.store.put_absent(build_id).is_err() {
            return Outcome::Failed;
        }
        worst
    }

    async fn fetch_from(
        &self,
        client: &Client,
        url: &Url,
        build_id: &BuildId,
    ) -> Result<Outcome, FetchError> {
        let mut answer = client.get(file_url(url, build_id)).send().await?;
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(Outcome::Absent),
            status => return Err(FetchError::Status(status)),
        }
        let mut left = self.file_bytes_max;
        if answer.content_length().is_some_and(|bytes| bytes > left) {
            return Ok(Outcome::Refused);
        }
        let mut incoming = self.store.receive(build_id)?;
        while let Some(bytes) = answer.chunk().await? {
            self.counts.received_bytes.fetch_add(bytes.len() as u64, Relaxed);
            match left.checked_sub(bytes.len() as u64) {
                Some(rest) => left = rest,
                None => return Ok(Outcome::Refused),
            }
            incoming.write(&bytes)?;
        }
        self.take(&incoming, build_id)
    }

    fn take(&self, incoming: &Incoming, build_id: &BuildId) -> Result<Outcome, FetchError> {
        match self.store.take(incoming, build_id) {
            Ok(()) => Ok(Outcome::Fetched),
            Err(TakeError::NotOfThisBuildId | TakeError::NamesOtherFile) => Ok(Outcome::Refused),
            Err(TakeError::Keep(error)) => Err(error.into()),
        }
    }

    /// Counts an outcome, and has the executables that waited for it read again.
    fn finish(&self, build_id: BuildId, outcome: Outcome, queue: &Queue) {
        let count = match outcome {
            Outcome::Fetched => &self.counts.fetched,
            Outcome::Absent => &self.counts.absent,
            Outcome::Refused => &self.counts.refused,
            Outcome::Failed => &self.counts.failed,
        };
        count.fetch_add(1, Relaxed);
        let request = match outcome {
            Outcome::Failed => self.requests().insert(build_id, Request::Failed(Instant::now())),
            _ => self.requests().remove(&build_id),
        };
        if let (Outcome::Fetched, Some(Request::Waiting(told))) = (outcome, request) {
            told.iter().filter_map(Weak::upgrade).for_each(|executable| queue.reload(executable));
        }
    }

    fn requests(&self) -> MutexGuard<'_, HashMap<BuildId, Request>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fetcher {
    /// For those who look for debug files.
    pub(super) fn debuginfod(&self) -> Arc<DebugInfod> {
        Arc::clone(&self.debuginfod)
    }

    /// Starts the thread. It writes files, so it is no task of the runtime's own threads.
    pub(super) fn start(self, queue: Arc<Queue>) -> io::Result<JoinHandle<()>> {
        thread::Builder::new().name("debuginfod".into()).spawn(move || {
            let runtime = self.runtime.clone();
            runtime.block_on(self.run(&queue));
        })
    }

    async fn run(self, queue: &Queue) {
        let Self { debuginfod, mut receiver, runtime: _ } = self;
        let mut is_closed = debuginfod.is_closed.subscribe();
        let ask = async {
            while let Some(build_id) = receiver.recv().await {
                let outcome = debuginfod.fetch(&build_id).await;
                debuginfod.finish(build_id, outcome, queue);
            }
        };
        tokio::select! {
            () = ask => {}
            _ = is_closed.wait_for(|&is_closed| is_closed) => {}
        }
    }
}

/// How a server is reached. No redirect is followed: build ids go to the addresses that were named.
fn client(url: &Url) -> reqwest::Result<Client> {
    let client = Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .timeout(REQUEST_TIMEOUT)
        .redirect(Policy::none());
    let is_local = url.host_str().is_some_and(is_loopback);
    if is_local { client.no_proxy() } else { client }.build()
}

/// `<base>/buildid/<hexadecimal>/debuginfo`.
fn file_url(base: &Url, build_id: &BuildId) -> Url {
    let mut url = base.clone();
    let path = format!("{}/buildid/{build_id}/debuginfo", url.path().trim_end_matches('/'));
    url.set_path(&path);
    url
}

/// Why a server's answer came to nothing.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("ask a server")]
    Http(#[from] reqwest::Error),
    #[error("the server answers {0}")]
    Status(StatusCode),
    #[error("keep a debug file")]
    Keep(#[from] io::Error),
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::path::Path;
    use std::process::Command;

    use super::*;
    use crate::addr::ElfAddr;
    use crate::background::Background;
    use crate::budget::TERM;
    use crate::executable::testing::{compile, read, run};
    use crate::symbolize::native::tests::{PROGRAM, asm_addr};
    use crate::symbolize::{Location, LocationKey, NameStore, Reason, Sources, Symbols};

    /// An answer: status line and body.
    type Answer = (&'static str, Vec<u8>);

    /// A server on this machine that gives one answer to all.
    struct Server {
        address: SocketAddr,
        requests: Arc<Mutex<Vec<String>>>,
        thread: Option<JoinHandle<()>>,
    }

    impl Server {
        fn start((status, body): Answer) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let requests = Arc::<Mutex<Vec<String>>>::default();
            let seen = Arc::clone(&requests);
            let thread = thread::spawn(move || {
                for connection in listener.incoming() {
                    let mut connection = connection.unwrap();
                    let mut lines = BufReader::new(connection.try_clone().unwrap()).lines();
                    let Some(Ok(request)) = lines.next() else { return };
                    let _ = lines.find(|line| line.as_ref().is_ok_and(String::is_empty));
                    seen.lock().unwrap().push(request);
                    let head = format!(
                        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                        body.len()
                    );
                    // The other side may have seen enough.
                    let _ = connection.write_all(head.as_bytes()).and_then(|()| connection.write_all(&body));
                }
            });
            Self { address, requests, thread: Some(thread) }
        }

        fn url(&self) -> Url {
            format!("http://{}/base/", self.address).parse().unwrap()
        }

        fn requests(&self) -> Vec<String> {
            self.requests.lock().unwrap().clone()
        }
    }

    impl Drop for Server {
        /// A connection without a request ends it.
        fn drop(&mut self) {
            drop(TcpStream::connect(self.address));
            self.thread.take().unwrap().join().unwrap();
        }
    }

    /// A stripped program, an address in it, and its debug file.
    struct Stripped {
        dir: tempfile::TempDir,
        executable: Arc<Executable>,
        addr: u64,
        debug: Vec<u8>,
    }

    fn stripped() -> Stripped {
        let dir = tempfile::tempdir().unwrap();
        let path = compile(dir.path(), "program", PROGRAM, &["-static"]);
        let [stripped, debug] = ["stripped", "debug"].map(|name| dir.path().join(name));
        run(Command::new("objcopy").arg("--strip-all").args([&path, &stripped]));
        run(Command::new("objcopy").arg("--only-keep-debug").args([&path, &debug]));
        let (executable, addr) = (read(&stripped).unwrap(), asm_addr(&path));
        Stripped { dir, executable, addr, debug: fs::read(debug).unwrap() }
    }

    /// Symbolizers that ask these servers, and the runtime that they need.
    struct Asking {
        symbols: Symbols,
        _runtime: runtime::Runtime,
    }

    fn ask_servers(urls: &[Url], dir: &Path, file_bytes_max: u64) -> Asking {
        // An error means that another test has installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut fetcher = DebugInfod::open(urls, dir.join("debuginfod"), runtime.handle().clone()).unwrap();
        Arc::get_mut(&mut fetcher.debuginfod).unwrap().file_bytes_max = file_bytes_max;
        let store = Some(Arc::new(NameStore::open(dir.join("names")).unwrap()));
        let sources = Sources { store, fetcher: Some(fetcher), ..Sources::default() };
        let background = Arc::new(Background::new(TERM, Instant::now()));
        let plan = crate::memory::MemoryPlan::for_limit(64 << 20, false).unwrap();
        let symbols = Symbols::start("/proc".as_ref(), &plan, sources, &background).unwrap();
        Asking { symbols, _runtime: runtime }
    }

    impl Asking {
        fn location(&self, stripped: &Stripped) -> Location {
            let executable = Arc::clone(&stripped.executable);
            let key = LocationKey::Native { executable, addr: ElfAddr(stripped.addr) };
            let id = key.id();
            self.symbols.resolve([key], soon()).remove(&id).unwrap()
        }

        /// Fetched, absent, refused, failed.
        fn counts(&self) -> [u64; 4] {
            let DebugInfodCounts { fetched, absent, refused, failed, dropped: _, received_bytes: _ } =
                self.symbols.debuginfod().unwrap().counts();
            [fetched, absent, refused, failed].map(|count| count.load(Relaxed))
        }

        /// Waits until the outcome of the first question is known.
        fn settle(&self) -> [u64; 4] {
            wait_for("an outcome", || Some(self.counts()).filter(|counts| counts.iter().sum::<u64>() > 0))
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[track_caller]
    fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let deadline = soon();
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(Instant::now() < deadline, "{what}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn names(location: &Location) -> Option<Vec<String>> {
        let Location::Resolved(frames) = location else { return None };
        Some(frames.iter().map(|frame| format!("{}:{}", frame.function, frame.line)).collect())
    }

    const NONE: Location = Location::Unresolved(Reason::NoSymbols);

    #[test]
    fn a_stripped_program_leaves_without_names_and_has_those_of_the_server_from_then_on() {
        let stripped = stripped();
        let away = Server::start(("404 Not Found", Vec::new()));
        let server = Server::start(("200 OK", stripped.debug.clone()));
        let asking = ask_servers(&[away.url(), server.url()], stripped.dir.path(), FILE_BYTES_MAX);
        assert_eq!(asking.location(&stripped), NONE);
        let found = wait_for("names", || names(&asking.location(&stripped)));
        assert_eq!(found, ["inlined:3", "hot:8"]);
        assert_eq!(asking.counts(), [1, 0, 0, 0]);
        let build_id = stripped.executable.build_id().unwrap();
        assert_eq!(server.requests(), [format!("GET /base/buildid/{build_id}/debuginfo HTTP/1.1")]);
        assert_eq!(away.requests(), server.requests());
        drop(asking);

        // The next agent asks nobody.
        let asking = ask_servers(&[server.url()], stripped.dir.path(), FILE_BYTES_MAX);
        assert_eq!(names(&asking.location(&stripped)), Some(found));
        assert_eq!(server.requests().len(), 1);
    }

    #[test]
    fn debug_information_of_another_build_id_is_refused_and_not_asked_for_again() {
        let stripped = stripped();
        let other = compile(stripped.dir.path(), "other", &PROGRAM.replace("hot", "bad"), &["-static"]);
        let server = Server::start(("200 OK", fs::read(other).unwrap()));
        let asking = ask_servers(&[server.url()], stripped.dir.path(), FILE_BYTES_MAX);
        assert_eq!(asking.location(&stripped), NONE);
        assert_eq!(asking.settle(), [0, 0, 1, 0]);
        drop(asking);
        let asking = ask_servers(&[server.url()], stripped.dir.path(), FILE_BYTES_MAX);
        assert_eq!(asking.location(&stripped), NONE);
        drop(asking);
        assert_eq!(server.requests().len(), 1);
    }

    #[test]
    fn what_a_server_does_not_have_is_remembered_across_restarts() {
        let stripped = stripped();
        let server = Server::start(("404 Not Found", Vec::new()));
        let asking = ask_servers(&[server.url()], stripped.dir.path(), FILE_BYTES_MAX);
        assert_eq!(asking.location(&stripped), NONE);
        assert_eq!(asking.settle(), [0, 1, 0, 0]);
        drop(asking);
        let asking = ask_servers(&[server.url()], stripped.dir.path(), FILE_BYTES_MAX);
        assert_eq!(asking.location(&stripped), NONE);
        drop(asking);
        assert_eq!(server.requests().len(), 1);
    }

    #[test]
    fn a_file_beyond_the_bound_is_refused() {
        let stripped = stripped();
        let server = Server::start(("200 OK", stripped.debug.clone()));
        let asking = ask_servers(&[server.url()], stripped.dir.path(), stripped.debug.len() as u64 - 1);
        assert_eq!(asking.location(&stripped), NONE);
        assert_eq!(asking.settle(), [0, 0, 1, 0]);
    }

    #[test]
    fn a_server_that_fails_or_redirects_is_asked_again_later() {
        let stripped = stripped();
        for status in ["500 Internal Server Error", "302 Found\r\nLocation: /elsewhere"] {
            let dir = tempfile::tempdir().unwrap();
            let server = Server::start((status, Vec::new()));
            let asking = ask_servers(&[server.url()], dir.path(), FILE_BYTES_MAX);
            assert_eq!(asking.location(&stripped), NONE);
            assert_eq!(asking.settle(), [0, 0, 0, 1], "{status}");
            let debuginfod = asking.symbols.debuginfod().unwrap();
            assert!(debuginfod.find(&stripped.executable).is_none());
            assert_eq!(server.requests().len(), 1, "not at once");
            for request in debuginfod.requests().values_mut() {
                *request = Request::Failed(Instant::now().checked_sub(RETRY_AFTER).unwrap());
            }
            assert!(debuginfod.find(&stripped.executable).is_none());
            wait_for("another request", || (server.requests().len() == 2).then_some(()));
        }
    }

    #[test]
    fn a_server_that_never_answers_does_not_keep_the_agent_from_ending() {
        let stripped = stripped();
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", silent.local_addr().unwrap()).parse().unwrap();
        let asking = ask_servers(&[url], stripped.dir.path(), FILE_BYTES_MAX);
        assert_eq!(asking.location(&stripped), NONE);
        let _asked = silent.accept().unwrap();
        drop(asking);
    }
}
