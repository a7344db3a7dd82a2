//! A running program, stopped at every instruction: the unwound stack against a shadow stack.
//!
//! The program is single-stepped from its first instruction in the dynamic linker to its exit, through lazy binding,
//! signal handlers on two stacks, the vDSO and a thread. The shadow stack is kept from what `call`, `ret`, signal
//! delivery and `sigreturn` do to the stack pointer, and knows nothing of unwind information. At every instruction the
//! return addresses must be the same, all the way to the thread's first frame, but for the C start files (`_init`,
//! `__do_global_dtors_aux`, ..), which have no unwind information.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use libc::{c_int, pid_t};
use object::{Object, ObjectSegment, SegmentFlags};
use profiler_common::unwind::x86_64::{BaseReg, Regs, step};
use profiler_common::unwind::{Block, ReadUser, Step, StopReason};
use profiler_unwind::{UnwindTable, from_elf, vdso};

const FRAMES_MAX: usize = 64;

/// Calls of ptrace(2), each for a thread that is stopped and traced by the calling thread.
mod ptrace {
    use super::{c_int, io, pid_t};

    fn check(result: libc::c_long) -> io::Result<()> {
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    pub(super) fn trace_me() -> io::Result<()> {
        // SAFETY: the request takes no pointers.
        check(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) })
    }

    pub(super) fn follow_clones(tid: pid_t) -> io::Result<()> {
        // SAFETY: the request takes flags, no pointers.
        check(unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, tid, 0, libc::PTRACE_O_TRACECLONE) })
    }

    pub(super) fn event_message(tid: pid_t) -> io::Result<u64> {
        let mut message = 0u64;
        // SAFETY: the kernel writes one unsigned long to the address, which is ours for the call.
        check(unsafe { libc::ptrace(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut message) })?;
        Ok(message)
    }

    pub(super) fn registers(tid: pid_t) -> io::Result<libc::user_regs_struct> {
        // SAFETY: the struct is integers only.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one user_regs_struct to the address, which is ours for the call.
        check(unsafe { libc::ptrace(libc::PTRACE_GETREGS, tid, 0, &raw mut registers) })?;
        Ok(registers)
    }

    pub(super) fn single_step(tid: pid_t, signal: c_int) -> io::Result<()> {
        // SAFETY: the request takes a signal number, no pointers.
        check(unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, tid, 0, signal) })
    }

    pub(super) fn resume(tid: pid_t) -> io::Result<()> {
        // SAFETY: the request takes a signal number, no pointers.
        check(unsafe { libc::ptrace(libc::PTRACE_CONT, tid, 0, 0) })
    }

    /// The status of a thread once it stops or ends.
    pub(super) fn wait(tid: pid_t) -> io::Result<c_int> {
        let mut status = 0;
        // SAFETY: the kernel writes one int to the address, which is ours for the call.
        let result = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) };
        if result == -1 { Err(io::Error::last_os_error()) } else { Ok(status) }
    }
}

/// Executable memory of the process.
struct Mapping {
    addresses: Range<u64>,
    bias: u64,
    path: String,
}

struct Process {
    tid: pid_t,
    memory: File,
    mappings: Vec<Mapping>,
    tables: HashMap<String, UnwindTable>,
    /// The last walk went through a frame in its middle that is based on rbx.
    went_by_rbx: bool,
}

/// Stack memory of one stop: a window read at once, the rest as it is asked for.
struct Stack<'a> {
    memory: &'a File,
    start: u64,
    window: Vec<u8>,
    block: Block,
}

impl<'a> Stack<'a> {
    fn new(memory: &'a File, sp: u64) -> Self {
        let mut window = vec![0; 4096];
        let read = memory.read_at(&mut window, sp).unwrap_or(0);
        window.truncate(read);
        Self { memory, start: sp, window, block: [0; 8] }
    }
}

impl ReadUser for Stack<'_> {
    fn read_u64(&mut self, addr: u64) -> Option<u64> {
        let at = addr.wrapping_sub(self.start) as usize;
        if let Some(bytes) = self.window.get(at..at.wrapping_add(8)) {
            return Some(u64::from_le_bytes(bytes.try_into().ok()?));
        }
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, addr).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    fn read_block64(&mut self, addr: u64) -> Option<&Block> {
        for at in 0..8 {
            self.block[at] = self.read_u64(addr.wrapping_add(at as u64 * 8))?;
        }
        Some(&self.block)
    }
}

impl Process {
    fn new(tid: pid_t) -> Self {
        let memory = File::open(format!("/proc/{tid}/mem")).unwrap();
        Self { tid, memory, mappings: Vec::new(), tables: HashMap::new(), went_by_rbx: false }
    }

    fn read_u64(&self, addr: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, addr).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn mapping(&mut self, address: u64) -> Option<&Mapping> {
        if !self.mappings.iter().any(|mapping| mapping.addresses.contains(&address)) {
            self.read_mappings();
        }
        self.mappings.iter().find(|mapping| mapping.addresses.contains(&address))
    }

    fn read_mappings(&mut self) {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.tid)).unwrap();
        self.mappings = maps.lines().filter_map(|line| self.read_mapping(line)).collect();
    }

    /// One line of /proc/PID/maps: `start-end perms offset dev inode path`.
    fn read_mapping(&mut self, line: &str) -> Option<Mapping> {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let &[addresses, permissions, offset, _, _, path] = &fields[..] else { return None };
        if !permissions.contains('x') || path == "[vsyscall]" {
            return None;
        }
        let (start, end) = addresses.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).unwrap();
        let addresses = hex(start)..hex(end);
        let elf = if path == "[vdso]" {
            let mut image = vec![0; (addresses.end - addresses.start) as usize];
            self.memory.read_exact_at(&mut image, addresses.start).unwrap();
            image
        } else {
            fs::read(path).unwrap()
        };
        self.tables.entry(path.to_owned()).or_insert_with(|| {
            if path == "[vdso]" { vdso::from_image(&elf) } else { from_elf(&elf) }.unwrap()
        });
        let bias = addresses.start.wrapping_sub(elf_address(&elf, hex(offset)));
        Some(Mapping { addresses, bias, path: path.to_owned() })
    }

    /// Return addresses from the innermost frame on, and how the walk ended.
    fn unwind(&mut self, mut regs: Regs) -> (Vec<u64>, StopReason) {
        let memory = self.memory.try_clone().unwrap();
        let mut stack = Stack::new(&memory, regs.sp().wrapping_sub(128));
        let mut frames = Vec::new();
        self.went_by_rbx = false;
        while frames.len() < FRAMES_MAX {
            let address = regs.lookup_address();
            let Some(mapping) = self.mapping(address) else { return (frames, StopReason::NoMapping) };
            let (path, bias) = (mapping.path.clone(), mapping.bias);
            let rule = self.tables[&path].find(address.wrapping_sub(bias));
            let Some(rule) = rule else { return (frames, StopReason::NoUnwindInformation) };
            let went_by_rbx = regs.exact == 0 && rule.base == BaseReg::Rbx as u8;
            let outcome = step(rule, &mut regs, &mut stack);
            self.went_by_rbx |= went_by_rbx;
            match outcome {
                Step::Caller => frames.push(regs.ip),
                Step::Stop(reason) => return (frames, reason),
            }
        }
        (frames, StopReason::DepthLimit)
    }
}

/// The address at which the ELF file states a byte of executable code.
fn elf_address(elf: &[u8], offset: u64) -> u64 {
    let file = object::File::parse(elf).unwrap();
    let segments = file.segments().filter(
        |segment| matches!(segment.flags(), SegmentFlags::Elf { p_flags } if p_flags & object::elf::PF_X != 0),
    );
    let page = |offset: u64| offset & !4095;
    let segment = segments
        .map(|segment| (segment.address(), segment.file_range()))
        .find(|&(_, (start, bytes))| (page(start)..start + bytes).contains(&offset));
    let (address, (start, _)) = segment.expect("code is mapped from an executable segment");
    address.wrapping_add(offset).wrapping_sub(start)
}

/// Calls since the thread began or since a signal came.
struct Segment {
    /// Stack slot and value of each return address, the innermost last.
    calls: Vec<(u64, u64)>,
    /// Where the signal came: instruction and stack pointer.
    interrupted: Option<(u64, u64)>,
}

struct Shadow {
    segments: Vec<Segment>,
    ip: u64,
    sp: u64,
}

impl Shadow {
    fn new(regs: &libc::user_regs_struct) -> Self {
        let first = Segment { calls: Vec::new(), interrupted: None };
        Self { segments: vec![first], ip: regs.rip, sp: regs.rsp }
    }

    /// A signal was delivered: the kernel has put a frame below the restorer's address.
    fn signal(&mut self, regs: &libc::user_regs_struct, process: &Process) {
        let calls = vec![(regs.rsp, process.read_u64(regs.rsp))];
        self.segments.push(Segment { calls, interrupted: Some((self.ip, self.sp)) });
        (self.ip, self.sp) = (regs.rip, regs.rsp);
    }

    /// One instruction was executed.
    fn step(&mut self, regs: &libc::user_regs_struct, process: &Process) {
        let (ip, sp) = (regs.rip, regs.rsp);
        let segment = self.segments.last_mut().unwrap();
        if segment.interrupted == Some((ip, sp)) && segment.calls.is_empty() {
            self.segments.pop();
        } else {
            segment.calls.retain(|&(slot, _)| slot >= sp);
            // A call pushes the address of the instruction behind it; calls are 2 to 7 bytes long.
            if sp == self.sp.wrapping_sub(8) {
                let pushed = process.read_u64(sp);
                if (2..=7).contains(&pushed.wrapping_sub(self.ip)) {
                    segment.calls.push((sp, pushed));
                }
            }
        }
        (self.ip, self.sp) = (ip, sp);
    }

    fn frames(&self) -> Vec<u64> {
        let mut frames = Vec::new();
        for segment in self.segments.iter().rev() {
            frames.extend(segment.calls.iter().rev().map(|&(_, return_address)| return_address));
            frames.extend(segment.interrupted.map(|(ip, _)| ip));
        }
        frames
    }
}

fn regs(from: &libc::user_regs_struct) -> Regs {
    Regs {
        ip: from.rip,
        exact: 1,
        gpr: [
            from.rax, from.rdx, from.rcx, from.rbx, from.rsi, from.rdi, from.rbp, from.rsp, from.r8, from.r9,
            from.r10, from.r11, from.r12, from.r13, from.r14, from.r15,
        ],
    }
}

#[derive(Default, Debug)]
struct Tally {
    stops: u64,
    deepest: usize,
    signals: u64,
    vdso_stops: u64,
    threads: u64,
    /// Stacks that are right as far as they go.
    without_information: u64,
    /// Those that go through `_dl_runtime_resolve`, whose frame is based on rbx.
    lazily_bound: u64,
    /// Stacks that end with the caller of the first frame: what musl calls `main` and threads from is taken for it.
    without_first: u64,
    wrong: u64,
    /// The first few.
    differences: Vec<String>,
}

impl Tally {
    fn compare(&mut self, process: &mut Process, shadow: &Shadow, at: &libc::user_regs_struct) {
        self.stops += 1;
        let expect = shadow.frames();
        self.deepest = self.deepest.max(expect.len());
        let mapping = process.mapping(at.rip);
        self.vdso_stops += u64::from(mapping.is_some_and(|mapping| mapping.path == "[vdso]"));
        let (frames, reason) = process.unwind(regs(at));
        self.lazily_bound += u64::from(process.went_by_rbx);
        match reason {
            reason if reason.is_complete() && frames == expect => {}
            StopReason::NoUnwindInformation if expect.starts_with(&frames) => self.without_information += 1,
            StopReason::End if expect.starts_with(&frames) && expect.len() == frames.len() + 1 => {
                self.without_first += 1;
            }
            _ => self.note_difference(process, at.rip, reason, &frames, &expect),
        }
    }

    fn note_difference(
        &mut self,
        process: &mut Process,
        ip: u64,
        reason: StopReason,
        frames: &[u64],
        expect: &[u64],
    ) {
        self.wrong += 1;
        if self.differences.len() < 20 {
            let place = process.mapping(ip).map(|mapping| (mapping.path.clone(), ip - mapping.bias));
            self.differences.push(format!("{place:x?}: {reason:?} after {frames:x?}, expected {expect:x?}"));
        }
    }
}

/// Steps a thread to its end; follows it into the threads it starts.
fn single_step(tid: pid_t, mut process: Process, tally: &mut Tally) {
    let mut at = ptrace::registers(tid).unwrap();
    let mut shadow = Shadow::new(&at);
    let mut signal = 0;
    loop {
        tally.compare(&mut process, &shadow, &at);
        ptrace::single_step(tid, signal).unwrap();
        let status = ptrace::wait(tid).unwrap();
        if libc::WIFEXITED(status) {
            assert_eq!(libc::WEXITSTATUS(status), 0);
            return;
        }
        assert!(libc::WIFSTOPPED(status), "status {status:#x}");
        if status >> 16 == libc::PTRACE_EVENT_CLONE {
            follow(tid, tally);
            return;
        }
        at = ptrace::registers(tid).unwrap();
        if signal != 0 {
            shadow.signal(&at, &process);
            tally.signals += 1;
        } else {
            shadow.step(&at, &process);
        }
        signal = match libc::WSTOPSIG(status) {
            libc::SIGTRAP => 0,
            other => other,
        };
    }
}

/// Steps the thread that was just started while the one that started it runs on.
fn follow(parent: pid_t, tally: &mut Tally) {
    let tid = pid_t::try_from(ptrace::event_message(parent).unwrap()).unwrap();
    ptrace::wait(tid).unwrap();
    ptrace::resume(parent).unwrap();
    tally.threads += 1;
    single_step(tid, Process::new(tid), tally);
    let status = ptrace::wait(parent).unwrap();
    assert!(libc::WIFEXITED(status), "status {status:#x}");
}

fn compile(compiler: &str, flags: &[&str], dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/frames.c");
    let program = dir.join("frames");
    let status = Command::new(compiler)
        .args(["-O2", "-fomit-frame-pointer", "-pthread", "-o"])
        .arg(&program)
        .args(flags)
        .arg(source)
        .status();
    assert!(status.unwrap_or_else(|error| panic!("{compiler}: {error}")).success());
    program
}

/// Lazy binding is for the dynamic linker to do unless `bind_now`.
fn start_traced(program: &Path, bind_now: bool) -> pid_t {
    let mut command = Command::new(program);
    command.stdout(Stdio::null()).env_clear();
    if bind_now {
        command.env("LD_BIND_NOW", "1");
    }
    // SAFETY: ptrace(2) is async-signal-safe.
    unsafe { command.pre_exec(ptrace::trace_me) };
    let tid = pid_t::try_from(command.spawn().unwrap().id()).unwrap();
    ptrace::wait(tid).unwrap();
    ptrace::follow_clones(tid).unwrap();
    tid
}

/// Every stack is right and reaches the first frame, but for the few stops in code that nothing describes.
#[track_caller]
fn check(compiler: &str, flags: &[&str], bind_now: bool) -> Tally {
    let tally = check_as_far_as_described(compiler, flags, bind_now);
    assert!(tally.without_information * 100 < tally.stops, "{tally:?}");
    assert_eq!(tally.without_first, 0, "{tally:?}");
    tally
}

/// Every stack is right as far as it goes.
#[track_caller]
fn check_as_far_as_described(compiler: &str, flags: &[&str], bind_now: bool) -> Tally {
    let dir = tempfile::tempdir().unwrap();
    let tid = start_traced(&compile(compiler, flags, dir.path()), bind_now);
    let mut tally = Tally::default();
    single_step(tid, Process::new(tid), &mut tally);
    eprintln!("{compiler} {flags:?}: {tally:#?}");
    assert_eq!(tally.wrong, 0);
    assert!(tally.stops > 10_000 && tally.deepest > 12 && tally.vdso_stops > 10, "{tally:?}");
    assert_eq!((tally.signals, tally.threads), (4, 1), "{tally:?}");
    tally
}

#[test]
fn every_instruction_of_a_program_unwinds_to_its_first_frame() {
    check("cc", &[], true);
}

#[test]
fn every_instruction_of_a_static_program_unwinds_to_its_first_frame() {
    check("cc", &["-static"], true);
}

#[test]
fn every_instruction_of_lazy_binding_unwinds_to_its_first_frame() {
    let tally = check("cc", &["-Wl,-z,lazy", "-fno-pie", "-no-pie"], false);
    assert!(tally.lazily_bound > 1000, "nothing was bound lazily: {tally:?}");
}

#[test]
#[ignore = "needs clang"]
fn every_instruction_of_a_program_by_clang_unwinds_to_its_first_frame() {
    check("clang", &[], true);
}

/// Debian's musl is built without call frame information: stacks end at the first of its functions that is not known by
/// name.
#[test]
#[ignore = "needs musl-gcc"]
fn every_instruction_of_a_program_with_musl_unwinds_as_far_as_it_is_described() {
    let tally = check_as_far_as_described("musl-gcc", &["-static"], true);
    assert!(tally.without_first > 0, "{tally:?}");
}
