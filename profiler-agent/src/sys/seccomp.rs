//! A child under a seccomp filter that calls a probed function: tells whether return probes survive such filters.
//!
//! On x86 kernels from 6.11 on, a probed return enters the kernel by a system call of its own, which filters of those days
//! do not know and may kill for. Later ones let it pass. Source: arch/x86/kernel/uprobes.c: uretprobe; kernel/seccomp.c.

use std::{
    io::{self, PipeWriter, Read as _},
    os::fd::AsRawFd as _,
};

use super::probed::Probed;

const SECCOMP_SET_MODE_FILTER: libc::c_long = 1;
const SECCOMP_RET_ALLOW: u32 = 0x7fff_0000;
const SECCOMP_RET_KILL_PROCESS: u32 = 0x8000_0000;
/// `BPF_LD | BPF_W | BPF_ABS`, `BPF_JMP | BPF_JEQ | BPF_K`, `BPF_RET | BPF_K`. Source: include/uapi/linux/bpf_common.h.
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// What the child exits with when it comes to its end.
const SURVIVED: libc::c_int = 42;

/// A child that waits to be probed.
pub(crate) struct FilteredChild {
    pid: libc::pid_t,
    go: Option<PipeWriter>,
}

impl FilteredChild {
    /// Forks it.
    ///
    /// # Errors
    /// Where there is no room for a process or a pipe.
    pub(crate) fn start() -> io::Result<Self> {
        let (mut wait, go) = io::pipe()?;
        let go_fd = go.as_raw_fd();
        // SAFETY: until it exits, the child calls nothing but system calls and the probed function: no lock that another
        // thread of the parent may hold, no allocation.
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                // SAFETY: the child's own copy of the descriptor: the read below is to end when the parent's goes.
                unsafe { libc::close(go_fd) };
                let mut byte = [0];
                let is_wanted = matches!(wait.read(&mut byte), Ok(1));
                let survived = is_wanted && filter() && Probed::EmulatedReturn.call(7) == 7;
                // SAFETY: ends the child without running anything of the parent's.
                unsafe { libc::_exit(if survived { SURVIVED } else { 1 }) }
            }
            pid => Ok(Self { pid, go: Some(go) }),
        }
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.cast_unsigned()
    }

    /// Lets it take up the filter and call the function. Gives whether it survived.
    pub(crate) fn survives(mut self) -> bool {
        use io::Write as _;
        // An error means that it is dead.
        let told = self.go.take().is_some_and(|mut go| go.write_all(&[1]).is_ok());
        told && self.wait() == Some(SURVIVED)
    }

    /// Its exit code, where it has one.
    fn wait(&mut self) -> Option<libc::c_int> {
        let mut status = 0;
        // SAFETY: a child of ours that nobody else waits for, and a word for its status.
        let waited = unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        let is_it = waited == self.pid;
        self.pid = -1;
        (is_it && libc::WIFEXITED(status)).then(|| libc::WEXITSTATUS(status))
    }
}

impl Drop for FilteredChild {
    fn drop(&mut self) {
        self.go = None;
        if self.pid > 0 {
            self.wait();
        }
    }
}

/// Allows this process to exit, and nothing else.
fn filter() -> bool {
    let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let mut rules = [
        // The number of the system call is the first word of `struct seccomp_data`.
        statement(LOAD, 0),
        libc::sock_filter { code: JUMP_IF_EQUAL, jt: 0, jf: 1, k: libc::SYS_exit_group as u32 },
        statement(RETURN, SECCOMP_RET_ALLOW),
        statement(RETURN, SECCOMP_RET_KILL_PROCESS),
    ];
    let program = libc::sock_fprog { len: rules.len() as u16, filter: rules.as_mut_ptr() };
    // SAFETY: takes numbers only.
    let no_new = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: the program and its rules outlive the call, and its length is theirs.
    no_new == 0
        && unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &raw const program) } == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_is_not_probed_survives_its_filter() {
        assert!(FilteredChild::start().expect("a child").survives());
    }

    #[test]
    fn a_child_that_is_not_wanted_ends() {
        let child = FilteredChild::start().expect("a child");
        let pid = child.pid;
        drop(child);
        // SAFETY: asks whether the process is there; no signal is sent.
        assert_eq!(unsafe { libc::kill(pid, 0) }, -1, "it has been waited for");
    }
}
