//! Stops a new process between the work of its dynamic linker and the first instruction of its own code, constructors
//! included: all its libraries are mapped by then, and none of them has run.
//!
//! ```text
//! held before exec ─ PTRACE_SEIZE ─▶ exec ─ breakpoint on the linker's `_dl_debug_state` ─▶ hit, the objects are there:
//!                                                                        stopped until `Loaded` is dropped
//! ```
//! Source: ptrace(2); link.h: `r_debug.r_brk` is that function in glibc and musl. A static program is stopped at its
//! entry point. x86-64 only: elsewhere a process is not stopped.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    mem,
    path::PathBuf,
    ptr,
};

use object::{Object as _, ObjectSymbol as _};

/// Source: include/uapi/linux/auxvec.h.
const AT_BASE: u64 = 7;
const AT_ENTRY: u64 = 9;
/// Bytes of a dynamic linker that are read; musl's is its C library.
const LINKER_BYTES_MAX: u64 = 64 << 20;
/// The breakpoint instruction, int3.
const BREAKPOINT: u8 = 0xcc;
/// Byte offset of the instruction pointer. Source: sys/user.h: struct user_regs_struct.
const RIP: usize = 16 * 8;
/// Hits of the breakpoint that are looked at: the linker tells of each change of its list.
const HITS_MAX: u32 = 64;

/// A process that is traced by this thread and has not called exec yet.
#[derive(Debug)]
#[must_use]
pub(crate) struct Traced {
    pid: libc::pid_t,
}

/// A process that is stopped with all its libraries. It goes on when this is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Loaded {
    pid: libc::pid_t,
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // One that was killed meanwhile is traced no more.
        let _ = request(libc::PTRACE_DETACH, self.pid, 0, 0);
    }
}

/// What a traced process has come to.
enum Stop {
    /// It has a new image.
    Exec,
    /// The breakpoint, or a single step.
    Trap,
    /// A signal is to be delivered.
    Signal(i32),
    /// Not a stop of ours: a group stop, or another event.
    Other,
    /// It has ended.
    Ended,
}

impl Traced {
    /// Follows a child that waits before exec. All that follows is to be called by this thread.
    ///
    /// # Errors
    /// When the kernel does not allow it, or somebody else traces the process.
    pub(crate) fn seize(pid: u32) -> io::Result<Self> {
        let pid = pid.cast_signed();
        let options = libc::PTRACE_O_TRACEEXEC;
        request(libc::PTRACE_SEIZE, pid, 0, options as usize)?;
        Ok(Self { pid })
    }

    /// Waits for exec and for the dynamic linker; `is_loaded` says whether its objects are there. `None` for a process that
    /// ended before, as one does whose command cannot be run.
    ///
    /// # Errors
    /// When the process cannot be followed; it is let go.
    pub(crate) fn wait_until_loaded(self, is_loaded: impl Fn() -> bool) -> io::Result<Option<Loaded>> {
        let loaded = Loaded { pid: self.pid };
        if !self.wait_for(|stop| matches!(stop, Stop::Exec))? {
            return Ok(None);
        }
        let at = self.breakpoint_address()?;
        let word = self.read(at.address)?;
        for _ in 0..HITS_MAX {
            let mut bytes = word.to_ne_bytes();
            bytes[0] = BREAKPOINT;
            self.write(at.address, usize::from_ne_bytes(bytes))?;
            request(libc::PTRACE_CONT, self.pid, 0, 0)?;
            if !self.wait_for(|stop| matches!(stop, Stop::Trap))? {
                return Ok(None);
            }
            self.write(at.address, word)?;
            request(libc::PTRACE_POKEUSER, self.pid, RIP, at.address)?;
            if at.is_entry || is_loaded() {
                return Ok(Some(loaded));
            }
            // Over the instruction, so that the breakpoint can be put back.
            request(libc::PTRACE_SINGLESTEP, self.pid, 0, 0)?;
            if !matches!(self.wait()?, Stop::Trap) {
                return Ok(Some(loaded));
            }
        }
        Ok(Some(loaded))
    }

    /// Lets the process, which runs, go on until it stops as wanted; `false` when it ends before. Signals are delivered.
    fn wait_for(&self, is_wanted: impl Fn(&Stop) -> bool) -> io::Result<bool> {
        loop {
            let stop = self.wait()?;
            if is_wanted(&stop) {
                return Ok(true);
            }
            let signal = match stop {
                Stop::Ended => return Ok(false),
                Stop::Signal(signal) => signal,
                Stop::Exec | Stop::Trap | Stop::Other => 0,
            };
            request(libc::PTRACE_CONT, self.pid, 0, signal as usize)?;
        }
    }

    /// Waits for the next stop and leaves the status of an end to the parent.
    fn wait(&self) -> io::Result<Stop> {
        // SAFETY: all-zero bytes are a siginfo_t, which the kernel fills in.
        let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
        let options = libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT;
        // SAFETY: `info` is a siginfo_t of ours.
        let status = unsafe { libc::waitid(libc::P_PID, self.pid as libc::id_t, &raw mut info, options) };
        if status < 0 {
            let error = io::Error::last_os_error();
            // Its parent, another thread, has waited for it already.
            return if error.raw_os_error() == Some(libc::ECHILD) { Ok(Stop::Ended) } else { Err(error) };
        }
        // SAFETY: waitid has filled in the fields of a child's status.
        let status = unsafe { info.si_status() };
        Ok(match (info.si_code, status & 0x7f, status >> 8) {
            (libc::CLD_TRAPPED, libc::SIGTRAP, libc::PTRACE_EVENT_EXEC) => Stop::Exec,
            (libc::CLD_TRAPPED, libc::SIGTRAP, 0) => Stop::Trap,
            (libc::CLD_TRAPPED, signal, 0) => Stop::Signal(signal),
            (libc::CLD_TRAPPED | libc::CLD_STOPPED, ..) => Stop::Other,
            _ => Stop::Ended,
        })
    }

    fn read(&self, address: usize) -> io::Result<usize> {
        // The system call itself writes the word to where the C library's function does not want a pointer.
        let mut word = 0usize;
        // SAFETY: `word` is ours and has room for what the request writes.
        let status = unsafe {
            libc::syscall(
                libc::SYS_ptrace,
                libc::c_long::from(libc::PTRACE_PEEKTEXT),
                libc::c_long::from(self.pid),
                address,
                &raw mut word,
            )
        };
        if status < 0 { Err(io::Error::last_os_error()) } else { Ok(word) }
    }

    fn write(&self, address: usize, word: usize) -> io::Result<()> {
        request(libc::PTRACE_POKETEXT, self.pid, address, word)
    }

    fn breakpoint_address(&self) -> io::Result<At> {
        let directory = PathBuf::from(format!("/proc/{}", self.pid));
        let auxv = fs::read(directory.join("auxv"))?;
        let value = |tag| auxiliary(&auxv, tag).unwrap_or(0);
        let entry = At { address: value(AT_ENTRY) as usize, is_entry: true };
        Ok(match value(AT_BASE) {
            0 => entry,
            base => linker_breakpoint(&directory, base).map_or(entry, |offset| At {
                address: (base.wrapping_add(offset)) as usize,
                is_entry: false,
            }),
        })
    }
}

/// Where the breakpoint goes.
#[derive(Clone, Copy)]
struct At {
    address: usize,
    /// The program's entry point, where everything is loaded.
    is_entry: bool,
}

/// Where the dynamic linker says `_dl_debug_state` is; it lies at 0 in its own file.
fn linker_breakpoint(directory: &std::path::Path, base: u64) -> Option<u64> {
    let maps = fs::read_to_string(directory.join("maps")).ok()?;
    let start = format!("{base:x}-");
    let range = maps.lines().find(|line| line.starts_with(&start))?.split(' ').next()?;
    let file = File::open(directory.join("map_files").join(range)).ok()?;
    let mut bytes = Vec::new();
    file.take(LINKER_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    let file = object::File::parse(bytes.as_slice()).ok()?;
    let mut symbols = file.dynamic_symbols();
    symbols
        .find(|symbol| symbol.name() == Ok("_dl_debug_state") && symbol.address() != 0)
        .map(|s| s.address())
}

/// The value behind a tag of the auxiliary vector.
fn auxiliary(auxv: &[u8], wanted: u64) -> Option<u64> {
    let words: Vec<u64> = auxv.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    words.as_chunks::<2>().0.iter().find(|[tag, _]| *tag == wanted).map(|[_, value]| *value)
}

/// A request that takes and gives numbers only.
fn request(request: libc::c_uint, pid: libc::pid_t, address: usize, number: usize) -> io::Result<()> {
    let (address, number) = (ptr::without_provenance_mut::<libc::c_void>(address), number);
    // SAFETY: of the requests used here none writes memory of this process; the tracee's is its own.
    let status =
        unsafe { libc::ptrace(request, pid, address, ptr::without_provenance_mut::<libc::c_void>(number)) };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::sys::hold::Hold;

    /// Runs a command to its stop, and gives what it had mapped then and how it ended.
    fn stopped(command: &mut Command) -> (Option<String>, bool) {
        let (hold, gate) = Hold::new().expect("pipes");
        gate.install(command);
        std::thread::scope(|scope| {
            let spawning = scope.spawn(move || command.spawn());
            let hold = hold.wait_for_child().expect("a child");
            let pid = hold.pid();
            let traced = Traced::seize(pid).expect("a child of ours can be traced");
            hold.release().expect("it goes on");
            let maps = || fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
            let loaded = traced.wait_until_loaded(|| maps().contains("libc.so")).expect("it can be followed");
            let mapped = loaded.is_some().then(maps);
            drop(loaded);
            let child = spawning.join().expect("no panic");
            (mapped, child.is_ok_and(|mut child| child.wait().expect("it ends").success()))
        })
    }

    #[test]
    fn a_process_is_stopped_with_its_libraries_and_goes_on() {
        let (mapped, success) = stopped(Command::new("sh").args(["-c", "exit 0"]));
        assert!(mapped.is_some_and(|maps| maps.contains("libc.so")), "stopped with its C library");
        assert!(success, "and went on");
    }

    #[test]
    fn a_command_that_cannot_be_run_is_not_waited_for() {
        assert_eq!(stopped(&mut Command::new("/no/such/program")), (None, false));
    }
}
