//! A new process that waits between fork and exec until it is released.

use std::{
    io::{self, PipeReader, PipeWriter, Read as _, Write as _, pipe},
    os::{
        fd::{AsRawFd as _, RawFd},
        unix::process::CommandExt as _,
    },
    process::{Child, Command},
};

/// This side of the gate: told the child's id, and lets it go. Dropped, it makes the child end without exec.
#[derive(Debug)]
pub(crate) struct Hold {
    pid: u32,
    pid_reader: PipeReader,
    go: PipeWriter,
}

/// The child's side of the gate.
pub(crate) struct Gate {
    pid_writer: PipeWriter,
    wait: PipeReader,
    /// The parent's ends, which the child must not keep open: it would wait for itself.
    parents: [RawFd; 2],
}

impl Hold {
    /// Both sides.
    pub(crate) fn new() -> io::Result<(Self, Gate)> {
        let (pid_reader, pid_writer) = pipe()?;
        let (wait, go) = pipe()?;
        let parents = [pid_reader.as_raw_fd(), go.as_raw_fd()];
        Ok((Self { pid: 0, pid_reader, go }, Gate { pid_writer, wait, parents }))
    }

    /// Waits until the child is at the gate.
    pub(crate) fn wait_for_child(mut self) -> io::Result<Self> {
        let mut pid = [0; 4];
        self.pid_reader.read_exact(&mut pid)?;
        self.pid = u32::from_ne_bytes(pid);
        Ok(self)
    }

    /// The child's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Opens the gate.
    pub(crate) fn release(mut self) -> io::Result<()> {
        self.go.write_all(&[1])
    }
}

impl Gate {
    /// Makes the command's process stop here before exec.
    pub(crate) fn install(self, command: &mut Command) {
        let Self { mut pid_writer, mut wait, parents } = self;
        let hold = move || {
            for fd in parents {
                // SAFETY: the descriptors are the fork's copies of the parent's ends, which nothing here uses.
                unsafe { libc::close(fd) };
            }
            pid_writer.write_all(&std::process::id().to_ne_bytes())?;
            wait.read_exact(&mut [0])
        };
        // SAFETY: between fork and exec, the closure calls close, getpid, write and read only: all async-signal-safe,
        // and it allocates nothing but for an error, of a process that ends then.
        unsafe { command.pre_exec(hold) };
    }
}

/// Whether a child has ended. Its status stays for the one who waits for it, and so does its entry in `/proc`.
pub(crate) fn has_ended(child: &Child) -> io::Result<bool> {
    use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
    let pid = Pid::from_child(child);
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    Ok(waitid(WaitId::Pid(pid), options)?.is_some())
}

/// Asks a child to end: SIGTERM.
pub(crate) fn terminate(child: &Child) {
    let pid = child.id().cast_signed();
    // SAFETY: the child has not been waited for, so the id is its own; no memory is involved.
    unsafe { libc::kill(pid, libc::SIGTERM) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_waits_at_the_gate_under_the_pid_it_keeps() {
        let (hold, gate) = Hold::new().expect("pipes");
        let mut command = Command::new("true");
        gate.install(&mut command);
        let spawning = std::thread::spawn(move || command.spawn());
        let hold = hold.wait_for_child().expect("a child");
        let pid = hold.pid();
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).expect("it waits");
        assert_ne!(comm.trim(), "true", "before exec");
        hold.release().expect("it goes on");
        let mut child = spawning.join().expect("no panic").expect("it runs");
        assert_eq!(child.id(), pid);
        assert!(child.wait().expect("it ends").success());
    }

    #[test]
    fn a_child_that_has_ended_is_there_until_it_is_waited_for() {
        let mut child = Command::new("false").spawn().expect("it starts");
        while !has_ended(&child).expect("a child of ours") {
            std::thread::yield_now();
        }
        assert!(std::path::Path::new(&format!("/proc/{}/stat", child.id())).exists());
        assert_eq!(child.wait().expect("it has ended").code(), Some(1));
    }

    #[test]
    fn a_hold_that_is_dropped_ends_the_child() {
        let (hold, gate) = Hold::new().expect("pipes");
        let mut command = Command::new("true");
        gate.install(&mut command);
        let spawning = std::thread::spawn(move || command.spawn());
        drop(hold.wait_for_child().expect("a child"));
        spawning.join().expect("no panic").expect_err("never exec'ed");
    }
}
