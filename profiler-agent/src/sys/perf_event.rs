//! Perf events of a CPU: those with a sampling program on them, and the one that tells of executable mappings.
//!
//! aya opens perf events too, but without `exclude_idle`, and it enables them at once.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
};

/// Above this `kernel.perf_event_paranoid`, Debian's and Ubuntu's kernels refuse events to all without CAP_SYS_ADMIN. Those
/// of kernel.org have no such level.
pub(crate) const PARANOIA_MAX: i32 = 2;

/// `kernel.perf_event_paranoid`; `None` where it cannot be read.
pub(crate) fn paranoia(proc: &Path) -> Option<i32> {
    fs::read_to_string(proc.join("sys/kernel/perf_event_paranoid")).ok()?.trim().parse().ok()
}

/// `perf_event_attr` up to the fields used here. Source: include/uapi/linux/perf_event.h, PERF_ATTR_SIZE_VER3 (Linux 3.7).
#[repr(C)]
#[derive(Default)]
struct Attr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    /// In bytes, with [`WATERMARK`].
    wakeup_watermark: u32,
    bp_type: u32,
    config1: u64,
    config2: u64,
    branch_sample_type: u64,
    sample_regs_user: u64,
    sample_stack_user: u32,
    clock_id: i32,
}

const _: () = assert!(size_of::<Attr>() == 96, "PERF_ATTR_SIZE_VER3");

const PERF_TYPE_SOFTWARE: u32 = 1;
const PERF_COUNT_SW_CPU_CLOCK: u64 = 0;
const PERF_COUNT_SW_PAGE_FAULTS_MIN: u64 = 5;
const PERF_COUNT_SW_DUMMY: u64 = 9;
const PERF_SAMPLE_TIME: u64 = 1 << 2;
/// Bit of `perf_event_attr.disabled`.
const DISABLED: u64 = 1 << 0;
/// Bit of `perf_event_attr.exclude_idle`.
const EXCLUDE_IDLE: u64 = 1 << 7;
/// Bit of `perf_event_attr.mmap`: executable mappings; `mmap_data` would be all others.
const MMAP: u64 = 1 << 8;
/// Bit of `perf_event_attr.watermark`.
const WATERMARK: u64 = 1 << 14;
/// Bit of `perf_event_attr.sample_id_all`.
const SAMPLE_ID_ALL: u64 = 1 << 18;
/// Bit of `perf_event_attr.mmap2`: with device and inode.
const MMAP2: u64 = 1 << 23;
/// Bit of `perf_event_attr.use_clockid`.
const USE_CLOCK_ID: u64 = 1 << 25;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;

const PERF_EVENT_IOC_ENABLE: libc::Ioctl = 0x2400;
const PERF_EVENT_IOC_DISABLE: libc::Ioctl = 0x2401;
const PERF_EVENT_IOC_SET_BPF: libc::Ioctl = 0x4004_2408u32 as libc::Ioctl;

/// An event of one CPU. Closing it detaches the program.
#[derive(Debug)]
pub(crate) struct CpuEvent {
    fd: OwnedFd,
    period: u64,
}

impl CpuEvent {
    /// Opens a clock event on `cpu`, disabled, firing each `period_ns` of time that is not idle.
    #[doc(alias = "PERF_COUNT_SW_CPU_CLOCK")]
    pub(crate) fn clock(cpu: u32, period_ns: u64) -> io::Result<Self> {
        Self::open(cpu, PERF_COUNT_SW_CPU_CLOCK, period_ns, DISABLED | EXCLUDE_IDLE)
    }

    /// Opens an event on `cpu`, disabled, firing once in `period` page faults that needed no disk. It fires when the page is
    /// there (from Linux 5.9 on: mm/memory.c: mm_account_fault).
    #[doc(alias = "PERF_COUNT_SW_PAGE_FAULTS_MIN")]
    pub(crate) fn page_faults(cpu: u32, period: u64) -> io::Result<Self> {
        Self::open(cpu, PERF_COUNT_SW_PAGE_FAULTS_MIN, period, DISABLED)
    }

    fn open(cpu: u32, event: u64, period: u64, flags: u64) -> io::Result<Self> {
        let attr = Attr {
            kind: PERF_TYPE_SOFTWARE,
            size: size_of::<Attr>() as u32,
            config: event,
            sample_period: period,
            flags,
            ..Attr::default()
        };
        Ok(Self { fd: open(&attr, cpu)?, period })
    }

    /// The period it was opened with, which it keeps: `PERF_EVENT_IOC_PERIOD` changes when a clock event fires, but not
    /// the period that its samples state. Source: kernel/events/core.c, perf_swevent_hrtimer: `hw.last_period`.
    pub(crate) fn period(&self) -> u64 {
        self.period
    }

    /// Runs a loaded perf event program at each event.
    pub(crate) fn set_program(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        self.ioctl(PERF_EVENT_IOC_SET_BPF, program.as_raw_fd() as libc::c_ulong)
    }

    /// Starts the event.
    pub(crate) fn enable(&self) -> io::Result<()> {
        self.ioctl(PERF_EVENT_IOC_ENABLE, 0)
    }

    /// Stops the event; the program stays attached.
    pub(crate) fn disable(&self) -> io::Result<()> {
        self.ioctl(PERF_EVENT_IOC_DISABLE, 0)
    }

    fn ioctl(&self, request: libc::Ioctl, argument: libc::c_ulong) -> io::Result<()> {
        // SAFETY: the descriptor is a perf event of ours; the argument is what each request documents: nothing,
        // or a program's descriptor. Neither is an address.
        let status = unsafe { libc::ioctl(self.fd.as_fd().as_raw_fd(), request, argument) };
        if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Opens an event that counts nothing, and writes a record of each executable mapping that is made on `cpu` from now on,
/// by whomever, with its time on CLOCK_BOOTTIME. The descriptor is readable when so many bytes of records have been written
/// since it last was.
#[doc(alias = "PERF_RECORD_MMAP2")]
pub(super) fn open_mapping_event(cpu: u32, wakeup_bytes: u32) -> io::Result<OwnedFd> {
    let attr = Attr {
        kind: PERF_TYPE_SOFTWARE,
        size: size_of::<Attr>() as u32,
        config: PERF_COUNT_SW_DUMMY,
        sample_type: PERF_SAMPLE_TIME,
        flags: MMAP | MMAP2 | WATERMARK | SAMPLE_ID_ALL | USE_CLOCK_ID,
        wakeup_watermark: wakeup_bytes,
        clock_id: libc::CLOCK_BOOTTIME,
        ..Attr::default()
    };
    open(&attr, cpu)
}

fn open(attr: &Attr, cpu: u32) -> io::Result<OwnedFd> {
    // SAFETY: `attr` is a valid perf_event_attr of the size it states; the kernel copies it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const *attr,
            -1 as libc::pid_t,
            cpu.cast_signed(),
            -1 as libc::c_int,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just given us this descriptor, nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs root and BPF"]
    fn an_event_opens_starts_and_stops() {
        let event = CpuEvent::clock(0, 52_631_578).expect("CPU 0 has a clock");
        event.enable().expect("enable");
        event.disable().expect("disable");
    }
}
