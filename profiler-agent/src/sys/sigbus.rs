//! Outlives a mapped file that its owner makes shorter.
//!
//! blazesym maps the files it reads, and a page behind the end of its file raises SIGBUS, which ends a process. Any
//! process can do that to whoever profiles it: map a file as code, wait, truncate it. So while such a file is read, its
//! missing pages are replaced by pages of zeros, and what was read is thrown away.

use std::cell::Cell;
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::{io, ptr};

/// `BUS_ADRERR`: an address without memory behind it, as opposed to a failed memory cell. Source: sigaction(2).
const BUS_ADRERR: i32 = 2;

thread_local! {
    /// Pages replaced in the file this thread reads; `None` while it reads none.
    static REPLACED: Cell<Option<u32>> = const { Cell::new(None) };
}

/// What SIGBUS led to before; leaked, since a signal may come at any time.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

/// The file changed under the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileShrank;

/// Runs `read`, which reads mapped files on this thread and on no other.
pub(crate) fn guard<T>(read: impl FnOnce() -> T) -> Result<T, FileShrank> {
    let _done = Reading::start();
    let result = black_box(read());
    if REPLACED.get() == Some(0) { Ok(result) } else { Err(FileShrank) }
}

struct Reading;

impl Reading {
    fn start() -> Self {
        REPLACED.set(Some(0));
        Self
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        REPLACED.set(None);
    }
}

/// Installs the handler for the whole process, once. Other faults still end it as they did before.
pub(crate) fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed =
        INSTALLED.get_or_init(|| install_now().map_err(|error| error.raw_os_error().unwrap_or(0)));
    installed.map_err(io::Error::from_raw_os_error)
}

fn install_now() -> io::Result<()> {
    let mut before = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: with no new action this only writes the current one to `before`, which has its size.
    let asked = unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), before.as_mut_ptr()) };
    if asked != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: sigaction succeeded, so it was written in full.
    let before = unsafe { before.assume_init() };
    let flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    let action = libc::sigaction { sa_sigaction: on_sigbus as *const () as usize, sa_flags: flags, ..before };
    BEFORE.store(Box::into_raw(Box::new(before)), Ordering::Release);
    // SAFETY: the handler calls only what signal-safety(7) or a bare system call allows, and its type fits SA_SIGINFO.
    let installed = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    if installed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

extern "C" fn on_sigbus(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to a handler installed with SA_SIGINFO.
    let info = unsafe { &*info };
    let replaced = REPLACED.get().filter(|_| info.si_code == BUS_ADRERR);
    // SAFETY: SIGBUS fills the member of the union that holds the address.
    let addr = unsafe { info.si_addr() };
    match replaced {
        Some(pages) if replace_page(addr) => REPLACED.set(Some(pages.saturating_add(1))),
        _ => as_before(),
    }
}

/// Puts a page of zeros where the file has none any more; the faulting read then goes on.
fn replace_page(addr: *mut libc::c_void) -> bool {
    // SAFETY: sysconf only returns a number.
    let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let Ok(page_bytes) = usize::try_from(page_bytes) else { return false };
    let page = addr.map_addr(|addr| addr & !(page_bytes - 1));
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: this thread just failed to read a file's page here, so the page is part of a file mapping that no other
    // thread uses (`guard`), and its owner unmaps the whole range later whatever lies in it.
    let mapped = unsafe { libc::mmap(page, page_bytes, libc::PROT_READ, flags, -1, 0) };
    mapped == page
}

/// Hands the next SIGBUS, which comes at once when the instruction is repeated, to whom it led before.
fn as_before() {
    let before = BEFORE.load(Ordering::Acquire);
    // SAFETY: `before` was leaked by `install_now` before this handler could run, and is never written again.
    unsafe { libc::sigaction(libc::SIGBUS, before, ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd as _;

    use super::*;

    /// Reads the byte at `at` of a fresh 3-page mapping of a file that is then cut to one page.
    fn read_of_shortened_file(at: usize) -> u8 {
        let file: File = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 3 * 4096], 0).unwrap();
        let fd = file.as_raw_fd();
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), 3 * 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        file.set_len(4096).unwrap();
        // SAFETY: within the three pages just mapped; a missing page is what is tested.
        let byte = unsafe { ptr::read_volatile(start.cast::<u8>().wrapping_add(at)) };
        // SAFETY: exactly the range that mmap returned, not used any more.
        unsafe { libc::munmap(start, 3 * 4096) };
        byte
    }

    #[test]
    fn a_page_that_is_gone_reads_as_zero_and_is_reported() {
        install().unwrap();
        assert_eq!(guard(|| assert_eq!(read_of_shortened_file(2 * 4096), 0)), Err(FileShrank));
        assert_eq!(guard(|| read_of_shortened_file(10)), Ok(7));
    }

    #[test]
    fn outside_the_guard_it_ends_the_process_as_ever() {
        install().unwrap();
        // SAFETY: the child of this fork calls only system calls before it ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: a bare system call; no core file for a fault made on purpose.
            unsafe { libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
            read_of_shortened_file(4096);
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: waits for the child made above and writes its status.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert!(libc::WIFSIGNALED(status), "status {status:#x}");
        assert_eq!(libc::WTERMSIG(status), libc::SIGBUS);
    }
}
