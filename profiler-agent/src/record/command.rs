//! The command that is recorded: started at once, but held before its first instruction until sampling follows it.

use std::{
    ffi::OsString,
    os::unix::process::ExitStatusExt as _,
    process::{Child, Command, ExitCode, ExitStatus},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};

use tracing::warn;

use crate::{
    heap, privileges,
    sys::{
        hold::{self, Hold},
        loading::Traced,
    },
};

/// How long a command has to end after it was told to.
const END_DEADLINE: Duration = Duration::from_secs(5);
/// What shells give for a command that cannot be run.
pub(crate) const EXIT_NOT_RUN: u8 = 127;

/// A command that cannot be run.
#[derive(Debug, thiserror::Error)]
#[error("run {program}")]
pub(crate) struct NotRun {
    program: String,
    source: std::io::Error,
}

/// A process that will become the command.
pub(super) struct Waiting {
    hold: Hold,
    spawned: Receiver<std::io::Result<Child>>,
    program: String,
}

/// The command, from its first instruction on.
pub(super) struct Running {
    child: Child,
}

impl Waiting {
    /// Forks; `None` without a command.
    ///
    /// # Errors
    /// When no process can be had.
    pub(super) fn spawn(command: &[OsString]) -> anyhow::Result<Option<Self>> {
        let Some((program, arguments)) = command.split_first() else { return Ok(None) };
        let mut command = Command::new(program);
        command.args(arguments);
        privileges::give_back(&mut command);
        let (hold, gate) = Hold::new().context("make a pipe")?;
        gate.install(&mut command);
        let (sender, spawned) = channel();
        // `spawn` returns only when the new process has called exec, or could not.
        thread::Builder::new()
            .name("spawn".to_owned())
            .spawn(move || {
                let child = command.spawn();
                drop(command);
                // An error means that the recording has ended already.
                let _ = sender.send(child);
            })
            .context("start thread spawn")?;
        let program = program.to_string_lossy().into_owned();
        let hold = hold.wait_for_child().with_context(|| format!("start a process for {program}"))?;
        Ok(Some(Self { hold, spawned, program }))
    }

    /// Id of the process.
    pub(super) fn pid(&self) -> u32 {
        self.hold.pid()
    }

    /// Lets it become the command. Where it `is_stopped` for that, it waits before the first instruction of its own code, its
    /// libraries loaded, until `loaded` has looked at it.
    ///
    /// # Errors
    /// When the command cannot be run.
    pub(super) fn run(self, loaded: impl FnOnce(u32), is_stopped: bool) -> anyhow::Result<Running> {
        let Self { hold, spawned, program } = self;
        let pid = hold.pid();
        let traced = is_stopped.then(|| trace(pid)).flatten();
        hold.release().context("release the command")?;
        if let Some(traced) = traced {
            match traced.wait_until_loaded(|| heap::has_loaded(pid)) {
                Ok(Some(stopped)) => {
                    loaded(pid);
                    drop(stopped);
                }
                Ok(None) => {}
                Err(error) => warn!(pid, %error, "the command is not followed from its first instruction"),
            }
        }
        let spawned = spawned.recv().map_err(|_| anyhow!("the thread that spawns {program} died"))?;
        let child = spawned.map_err(|source| NotRun { program, source })?;
        Ok(Running { child })
    }
}

/// Follows the process to its first own instruction, where that can be done.
fn trace(pid: u32) -> Option<Traced> {
    if !cfg!(target_arch = "x86_64") {
        return None;
    }
    let traced = Traced::seize(pid);
    traced.inspect_err(|error| warn!(pid, %error, "the command cannot be stopped at its start")).ok()
}

impl Running {
    /// It has, and is still known to the kernel.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub(super) fn has_ended(&self) -> anyhow::Result<bool> {
        hold::has_ended(&self.child).context("look at the command")
    }

    /// Its status; one that still runs is asked to end.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub(super) fn finish(mut self) -> anyhow::Result<ExitStatus> {
        if !self.has_ended()? {
            hold::terminate(&self.child);
        }
        let deadline = Instant::now() + END_DEADLINE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().context("wait for the command")? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(20));
        }
        self.child.kill().context("kill the command")?;
        self.child.wait().context("wait for the command")
    }
}

/// A command's status as shells show it: its own, or 128 + the signal that ended it.
pub(super) fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
