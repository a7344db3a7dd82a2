//! What aya does not do of bpf(2): programs for uprobes in sessions and in numbers, their links, and reading a map in batches.
//!
//! Source: include/uapi/linux/bpf.h: union bpf_attr.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    path::Path,
};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_BTF_LOAD: libc::c_int = 18;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_PROG_TYPE_KPROBE: u32 = 2;
const BPF_PERF_EVENT: u32 = 41;
/// Kernel 6.6.
const BPF_TRACE_UPROBE_MULTI: u32 = 48;
/// Kernel 6.13.
const BPF_TRACE_UPROBE_SESSION: u32 = 57;
const BPF_F_UPROBE_MULTI_RETURN: u32 = 1;

/// How a program for uprobes is attached, which the kernel wants to know when it is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UprobeKind {
    /// One program for entries and the returns that it asks for; one link for all (kernel 6.13).
    Session,
    /// One link for all probes, of entries or of returns (kernel 6.6).
    Multi,
    /// A perf event for each probe.
    Perf,
}

impl UprobeKind {
    fn attach_type(self) -> u32 {
        match self {
            Self::Session => BPF_TRACE_UPROBE_SESSION,
            Self::Multi => BPF_TRACE_UPROBE_MULTI,
            Self::Perf => 0,
        }
    }
}

/// Bytes of the verifier's explanation that are kept.
const LOG_BYTES: usize = 1 << 20;

/// A program as the kernel takes it: its maps are in its instructions.
pub(crate) struct Code<'a> {
    /// Instructions, 8 bytes each.
    pub(crate) instructions: &'a [u8],
    /// Name of the license.
    pub(crate) license: &'a CStr,
    /// Types that the function records refer to.
    pub(crate) btf: BorrowedFd<'a>,
    /// `struct bpf_func_info`s: tells which functions are verified once.
    pub(crate) functions: Records<'a>,
    /// `struct bpf_line_info`s.
    pub(crate) lines: Records<'a>,
}

/// Records of one size.
pub(crate) struct Records<'a> {
    /// All of them.
    pub(crate) bytes: &'a [u8],
    /// Bytes of one.
    pub(crate) record_bytes: usize,
}

impl Records<'_> {
    fn count(&self) -> u32 {
        self.bytes.len().checked_div(self.record_bytes).unwrap_or(0) as u32
    }
}

#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    program_type: u32,
    instructions_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
    btf_fd: u32,
    function_record_bytes: u32,
    functions: u64,
    functions_count: u32,
    line_record_bytes: u32,
    lines: u64,
    lines_count: u32,
    reserved: u32,
}

/// Loads a program for uprobes.
///
/// # Errors
/// The kernel's error; where the verifier refused, the end of what it says is in the message.
pub(crate) fn load_uprobe(name: &str, kind: UprobeKind, code: &Code<'_>) -> io::Result<OwnedFd> {
    let &Code { instructions, license, btf, ref functions, ref lines } = code;
    let mut attr = ProgramLoad {
        program_type: BPF_PROG_TYPE_KPROBE,
        instructions_count: (instructions.len() / 8) as u32,
        instructions: address(instructions),
        license: license.as_ptr() as u64,
        expected_attach_type: kind.attach_type(),
        btf_fd: btf.as_raw_fd().cast_unsigned(),
        function_record_bytes: functions.record_bytes as u32,
        functions: address(functions.bytes),
        functions_count: functions.count(),
        line_record_bytes: lines.record_bytes as u32,
        lines: address(lines.bytes),
        lines_count: lines.count(),
        ..ProgramLoad::default()
    };
    for (to, from) in attr.name.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: every pointer in `attr` is to memory that outlives the call, with the length beside it.
    let first = unsafe { bpf_fd(BPF_PROG_LOAD, &attr) };
    let Err(error) = first else { return first };
    let mut log = vec![0; LOG_BYTES];
    (attr.log_level, attr.log_size, attr.log) = (1, LOG_BYTES as u32, address(&log));
    attr.log = log.as_mut_ptr() as u64;
    // SAFETY: as above; the kernel writes at most `log_size` bytes to the log.
    let second = unsafe { bpf_fd(BPF_PROG_LOAD, &attr) };
    second.map_err(|_| io::Error::new(error.kind(), format!("{error}: {}", end_of_log(&log))))
}

/// The last lines of the verifier's log, on one line.
fn end_of_log(log: &[u8]) -> String {
    let text = CStr::from_bytes_until_nul(log).map(CStr::to_bytes).unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let lines: Vec<_> = text.lines().rev().take(8).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
}

#[repr(C)]
#[derive(Default)]
struct BtfLoad {
    btf: u64,
    log: u64,
    btf_size: u32,
    log_size: u32,
    log_level: u32,
    reserved: u32,
}

/// Loads type information.
pub(crate) fn load_btf(btf: &[u8]) -> io::Result<OwnedFd> {
    let attr = BtfLoad { btf: address(btf), btf_size: btf.len() as u32, ..BtfLoad::default() };
    // SAFETY: the one pointer is to `btf`, whose length is beside it.
    unsafe { bpf_fd(BPF_BTF_LOAD, &attr) }
}

/// Where a probe goes, and the number that the program is given when it is hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Probe {
    /// Byte in the file.
    pub(crate) offset: u64,
    /// Given by `bpf_get_attach_cookie`.
    pub(crate) cookie: u64,
    /// Whether the return of the function is of interest.
    pub(crate) has_return: bool,
}

#[repr(C)]
#[derive(Default)]
struct UprobeLink {
    program_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    path: u64,
    offsets: u64,
    reference_counters: u64,
    cookies: u64,
    count: u32,
    uprobe_flags: u32,
    pid: u32,
    reserved: u32,
}

/// What a link of many probes is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkKind {
    /// Entries, and the returns that the program asks for; a program of [`UprobeKind::Session`].
    Session,
    /// Entries; [`UprobeKind::Multi`].
    Entries,
    /// Returns; [`UprobeKind::Multi`].
    Returns,
}

/// Puts breakpoints into one process. Closing the link takes them out, and so does the end of this process.
///
/// # Errors
/// ENOENT or ESRCH where the file or the process is gone, EINVAL where the kernel does not know the kind of link.
pub(crate) fn attach_uprobes(
    program: BorrowedFd<'_>,
    kind: LinkKind,
    file: &Path,
    pid: u32,
    probes: &[Probe],
) -> io::Result<OwnedFd> {
    let path = std::ffi::CString::new(file.as_os_str().as_encoded_bytes())?;
    let offsets: Vec<u64> = probes.iter().map(|probe| probe.offset).collect();
    let cookies: Vec<u64> = probes.iter().map(|probe| probe.cookie).collect();
    let (attach_type, uprobe_flags) = match kind {
        LinkKind::Session => (BPF_TRACE_UPROBE_SESSION, 0),
        LinkKind::Entries => (BPF_TRACE_UPROBE_MULTI, 0),
        LinkKind::Returns => (BPF_TRACE_UPROBE_MULTI, BPF_F_UPROBE_MULTI_RETURN),
    };
    let attr = UprobeLink {
        program_fd: program.as_raw_fd().cast_unsigned(),
        attach_type,
        path: path.as_ptr() as u64,
        offsets: address(&offsets),
        cookies: address(&cookies),
        count: probes.len() as u32,
        uprobe_flags,
        pid,
        ..UprobeLink::default()
    };
    // SAFETY: the pointers are to a path with its NUL and to two arrays of `count` words, which outlive the call.
    unsafe { bpf_fd(BPF_LINK_CREATE, &attr) }
}

#[repr(C)]
#[derive(Default)]
struct PerfLink {
    program_fd: u32,
    event_fd: u32,
    attach_type: u32,
    flags: u32,
    cookie: u64,
}

/// Runs a program at a perf event, with a number of its own. The link keeps the event.
///
/// # Errors
/// EINVAL where the kernel has no such links (before 5.15).
pub(crate) fn attach_to_event(
    program: BorrowedFd<'_>,
    event: BorrowedFd<'_>,
    cookie: u64,
) -> io::Result<OwnedFd> {
    let attr = PerfLink {
        program_fd: program.as_raw_fd().cast_unsigned(),
        event_fd: event.as_raw_fd().cast_unsigned(),
        attach_type: BPF_PERF_EVENT,
        flags: 0,
        cookie,
    };
    // SAFETY: there is no pointer in it.
    unsafe { bpf_fd(BPF_LINK_CREATE, &attr) }
}

#[repr(C)]
#[derive(Default)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    element_flags: u64,
    flags: u64,
}

/// Keys and values of a hash map, as their bytes. Entries that come or go meanwhile may be among them or not; no other is
/// missed.
///
/// # Errors
/// The kernel's; ENOSPC where a bucket of the map holds more than `BATCH` entries.
pub(crate) fn read_hash_map<const KEY: usize, const VALUE: usize>(
    map: BorrowedFd<'_>,
    mut each: impl FnMut(&[u8; KEY], &[u8; VALUE]),
) -> io::Result<()> {
    const BATCH: usize = 1024;
    let mut keys = vec![[0; KEY]; BATCH];
    let mut values = vec![[0; VALUE]; BATCH];
    // A position in a hash map is 4 bytes; other maps' are as long as a key.
    let mut position = [0u64; 2];
    let mut is_first = true;
    loop {
        let at = position.as_mut_ptr() as u64;
        let attr = Batch {
            in_batch: if is_first { 0 } else { at },
            out_batch: at,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: BATCH as u32,
            map_fd: map.as_raw_fd().cast_unsigned(),
            ..Batch::default()
        };
        // SAFETY: the arrays have room for `count` keys and values of the sizes the caller states for its map, and the
        // position for what a hash map writes. The kernel writes the number it found to `attr.count`.
        let status = unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &attr) };
        let is_last = match status {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        // SAFETY: a plain read of what the kernel has written behind the compiler's back.
        let count = unsafe { (&raw const attr.count).read_volatile() } as usize;
        for (key, value) in keys.iter().zip(&values).take(count) {
            each(key, value);
        }
        if is_last {
            return Ok(());
        }
        is_first = false;
    }
}

fn address<T>(slice: &[T]) -> u64 {
    slice.as_ptr() as u64
}

/// # Safety
/// `attr` is laid out as `command` wants it, and its pointers are good for what the command does with them.
unsafe fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<libc::c_long> {
    // SAFETY: the caller's promise; the size is `attr`'s own.
    let status = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(status) }
}

/// # Safety
/// As for [`bpf`]; `command` gives a descriptor.
unsafe fn bpf_fd<T>(command: libc::c_int, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the call has just given us this descriptor, nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}
