//! What runs beside the profilers: busy programs, the target whose slowdown is measured, and the backend.

use std::{
    fs::File,
    hint::black_box,
    net::{SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};

use super::{proc, profiler};
use crate::{command, project};

/// How long a process may take to answer or to end.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A child that is killed when it is dropped and has not ended by then.
pub(super) struct Running(Child);

impl Running {
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        command.spawn().map(Self).with_context(|| format!("start {}", command.get_program().display()))
    }

    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Fails when the process has ended.
    pub(super) fn check(&mut self) -> Result<()> {
        self.0.try_wait()?.map_or(Ok(()), |status| bail!("ended early: {status}"))
    }

    /// Ends the process as Ctrl-C does.
    pub(super) fn interrupt(mut self) -> Result<()> {
        command::run(Command::new("kill").args(["-INT", &self.pid().to_string()]))?;
        let end = Instant::now() + PATIENCE;
        while self.0.try_wait()?.is_none() {
            if Instant::now() > end {
                bail!("did not end {PATIENCE:?} after SIGINT");
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Programs that keep every CPU busy: C, Rust, Go, and kernel time.
pub(super) struct Load(#[expect(dead_code, reason = "held so that dropping it ends them")] Vec<Running>);

impl Load {
    pub(super) fn start() -> Result<Self> {
        let folder = project::target().join("testprogs");
        let programs = ["burn", "rust_burn", "goburn"].map(|name| Command::new(folder.join(name)));
        let mut dd = Command::new("dd");
        dd.args(["if=/dev/zero", "of=/dev/null", "bs=64k", "status=none"]);
        // The test programs end with the pipe on their standard input, so not even killing us leaves them behind.
        let start = |mut command: Command| {
            Running::start(command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()))
        };
        programs.into_iter().chain([dd]).map(start).collect::<Result<_>>().map(Self)
    }
}

/// The backend that the agent uploads to.
pub(super) struct Backend {
    pub(super) address: SocketAddr,
    _process: Running,
}

impl Backend {
    pub(super) fn start(work: &Path) -> Result<Self> {
        let address = free_address()?;
        let mut command = own_program("profiler-backend");
        command.args(["--listen", &address.to_string(), "--data-dir"]).arg(work.join("store"));
        let mut process = Running::start(command.stderr(log(work, "backend.log")?))?;
        let end = Instant::now() + PATIENCE;
        while profiler::get(address, "/api/v1/types").is_err() {
            process.check().context("the backend")?;
            if Instant::now() > end {
                bail!("the backend does not answer");
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(Self { address, _process: process })
    }
}

/// One of our programs, without the caller's settings and without a terminal.
pub(super) fn own_program(name: &str) -> Command {
    let mut command = Command::new(project::target().join("release").join(name));
    for (variable, _) in std::env::vars_os() {
        if variable.to_string_lossy().starts_with("PROFILER_") {
            command.env_remove(variable);
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

pub(super) fn log(work: &Path, name: &str) -> Result<File> {
    File::create(work.join(name)).with_context(|| format!("create {name}"))
}

/// An address nobody listens on now.
pub(super) fn free_address() -> Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).context("find a free port")
}

/// A busy thread of this process that counts its work: what sampling it costs shows as fewer rounds a CPU second.
pub(super) struct Target {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<f64>>,
}

impl Target {
    pub(super) fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        Self { stop, thread: thread::spawn(move || work_until(&seen)) }
    }

    /// Rounds of work per second of its own CPU time.
    pub(super) fn finish(self) -> Result<f64> {
        self.stop.store(true, Relaxed);
        self.thread.join().map_err(|_| anyhow!("the target thread panicked"))?
    }
}

fn work_until(stop: &AtomicBool) -> Result<f64> {
    let start_ns = proc::thread_cpu_ns()?;
    let (mut rounds, mut x) = (0_u32, 1_u64);
    while !stop.load(Relaxed) {
        x = (0..100_000).fold(x, |x, _| black_box(x.wrapping_mul(6364136223846793005).rotate_left(17)));
        rounds += 1;
    }
    let cpu_s = (proc::thread_cpu_ns()? - start_ns) as f64 / 1e9;
    Ok(f64::from(rounds) / cpu_s)
}
