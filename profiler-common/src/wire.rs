//! Records in the ring buffer from kernel to agent. Integers only, no implicit padding, little-endian as both sides run
//! on one machine. A record starts with a [`RecordHead`]; its `kind` says what follows.

use crate::limits::{COMM_BYTES, KERNEL_FRAMES_MAX, USER_FRAMES_MAX};

/// Version of every record. The agent refuses an object whose version differs: both are built from one tree.
pub const WIRE_VERSION: u8 = 2;

/// What a record is. Decoded with [`RecordKind::decode`], never cast: ring memory may hold any byte.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// A [`SampleHeader`] with an on-CPU stack.
    CpuSample = 1,
    /// A [`ProcessRecord`]: the process has a new image, everything known of its mappings is void.
    Exec = 2,
    /// A [`ProcessRecord`]: a process that the kernel side knew has forked this one.
    Fork = 3,
    /// A [`ProcessRecord`]: a process that the kernel side knew has ended, with all its threads.
    Exit = 4,
    /// A [`SampleHeader`] whose value is bytes, an [`AllocPart`](crate::heap::AllocPart), then the user frames: an
    /// allocation that was sampled. The innermost frame is the caller of the allocating function.
    AllocSample = 5,
    /// A [`SampleHeader`] whose value is page faults, a [`FaultPart`], then the user frames: a page fault that was sampled.
    PageFault = 6,
    /// A [`CgroupRecord`]: a cgroup was made.
    CgroupMade = 8,
}

impl RecordKind {
    /// The kind named by a byte, `None` for one this version does not know.
    #[must_use]
    pub const fn decode(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::CpuSample),
            2 => Some(Self::Exec),
            3 => Some(Self::Fork),
            4 => Some(Self::Exit),
            5 => Some(Self::AllocSample),
            6 => Some(Self::PageFault),
            8 => Some(Self::CgroupMade),
            _ => None,
        }
    }
}

/// Why a user stack has no further frame.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StackEnd {
    /// Unwind information says so, or the return address is zero: the thread's first frame. Also for a frame pointer of
    /// zero where the process has no tables.
    Root = 1,
    /// The task has no user stack: a kernel thread, or one past `exit_mm`.
    NoUserStack = 2,
    /// Stack memory could not be read (not resident, or the frame pointer was none).
    ReadFailed = 3,
    /// The next frame does not lie above this one: the frame pointer register holds something else.
    NotRising = 4,
    /// As many frames were taken as are asked for, at most [`USER_FRAMES_MAX`]; there are more.
    DepthLimit = 5,
    /// User registers of a task sampled in kernel mode could not be found.
    NoRegisters = 6,
    /// The frame pointer is zero where only frame pointers lead on: a thread's first frame, or one that uses the register
    /// for something else.
    FramePointerZero = 7,
    /// The address lies in no known mapping, and no frame pointer led on.
    NoMapping = 8,
    /// No unwind information covers the address, and no frame pointer led on.
    NoUnwindInformation = 9,
    /// The unwind information at the address cannot be expressed by a rule, or the rule is damaged.
    InvalidRule = 10,
    /// The rule needs a register that is only known in the innermost frame.
    RegisterLost = 11,
}

impl StackEnd {
    /// Every end, in the order of its number.
    pub const ALL: [Self; 11] = [
        Self::Root,
        Self::NoUserStack,
        Self::ReadFailed,
        Self::NotRising,
        Self::DepthLimit,
        Self::NoRegisters,
        Self::FramePointerZero,
        Self::NoMapping,
        Self::NoUnwindInformation,
        Self::InvalidRule,
        Self::RegisterLost,
    ];

    /// The end named by a byte, `None` for one this version does not know.
    #[must_use]
    pub const fn decode(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Root),
            2 => Some(Self::NoUserStack),
            3 => Some(Self::ReadFailed),
            4 => Some(Self::NotRising),
            5 => Some(Self::DepthLimit),
            6 => Some(Self::NoRegisters),
            7 => Some(Self::FramePointerZero),
            8 => Some(Self::NoMapping),
            9 => Some(Self::NoUnwindInformation),
            10 => Some(Self::InvalidRule),
            11 => Some(Self::RegisterLost),
            _ => None,
        }
    }

    /// The ends from which nothing is missing: a bit each, by number.
    pub const COMPLETE: u64 =
        1 << Self::Root as u64 | 1 << Self::NoUserStack as u64 | 1 << Self::FramePointerZero as u64;

    /// Nothing is missing from the stack.
    #[must_use]
    pub const fn is_complete(self) -> bool {
        Self::COMPLETE >> self as u64 & 1 == 1
    }

    /// The name used in metrics and marker frames.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::NoUserStack => "no_user_stack",
            Self::ReadFailed => "read_failed",
            Self::NotRising => "not_rising",
            Self::DepthLimit => "depth_limit",
            Self::NoRegisters => "no_registers",
            Self::FramePointerZero => "frame_pointer_zero",
            Self::NoMapping => "no_mapping",
            Self::NoUnwindInformation => "no_unwind_information",
            Self::InvalidRule => "invalid_rule",
            Self::RegisterLost => "register_lost",
        }
    }
}

/// One user frame: either an address in the process (raw) or, where the kernel side knows the mapping, an executable
/// and the address as its ELF file states it, which is equal across processes and can be resolved after the exit.
///
/// ```text
/// bit  63          62               61..40          39..0
///      raw = 1     return address   ---- address (bits 61..0) ----
///      raw = 0     return address   executable id   ELF address
/// ```
/// The address is the one to look up: for a return address one less than what was on the stack, so that it lies inside
/// the call instruction.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frame(pub u64);

impl Frame {
    const RAW: u64 = 1 << 63;
    const RETURN_ADDRESS: u64 = 1 << 62;
    const EXECUTABLE_SHIFT: u32 = 40;
    const ELF_ADDRESS_MASK: u64 = (1 << Self::EXECUTABLE_SHIFT) - 1;

    /// A frame by its address in the process. `address` is what the register or stack slot held.
    #[inline(always)]
    #[must_use]
    pub const fn raw(address: u64, return_address: bool) -> Self {
        let flag = if return_address { Self::RETURN_ADDRESS } else { 0 };
        let lookup = address.wrapping_sub(return_address as u64);
        Self((lookup & !(Self::RAW | Self::RETURN_ADDRESS)) | Self::RAW | flag)
    }

    /// The frame is an address in the process, not in an executable.
    #[must_use]
    pub const fn is_raw(self) -> bool {
        self.0 & Self::RAW != 0
    }

    /// The address was a return address before one was subtracted.
    #[must_use]
    pub const fn is_return_address(self) -> bool {
        self.0 & Self::RETURN_ADDRESS != 0
    }

    /// The address to look up: in the process when raw, in the executable otherwise.
    #[must_use]
    pub const fn address(self) -> u64 {
        let mask = if self.is_raw() { !(Self::RAW | Self::RETURN_ADDRESS) } else { Self::ELF_ADDRESS_MASK };
        self.0 & mask
    }

    /// The executable's number; `None` for a raw frame.
    #[must_use]
    pub const fn executable(self) -> Option<u32> {
        if self.is_raw() {
            return None;
        }
        Some(((self.0 & !Self::RETURN_ADDRESS) >> Self::EXECUTABLE_SHIFT) as u32)
    }
}

/// Flag of a sample: the user stack was walked by the tables of its process, not by frame pointers alone.
pub const FLAG_TABLES: u8 = 1;

/// Flag of a sample: [`KERNEL_FRAMES_MAX`] kernel frames were taken; there may be more.
pub const FLAG_KERNEL_CUT: u8 = 2;

/// Flag of a sample: it was taken in kernel mode, and the kernel gave no stack.
pub const FLAG_KERNEL_REFUSED: u8 = 4;

/// What every record starts with.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHead {
    /// [`WIRE_VERSION`].
    pub version: u8,
    /// [`RecordKind`].
    pub kind: u8,
    /// [`StackEnd`] of the user stack; 0 in records without one.
    pub user_end: u8,
    /// [`FLAG_TABLES`], [`FLAG_KERNEL_CUT`], [`FLAG_KERNEL_REFUSED`].
    pub flags: u8,
    /// User frames that follow, leaf first; at most [`USER_FRAMES_MAX`].
    pub user_frames: u16,
    /// Kernel frames that follow the user frames, leaf first; at most [`KERNEL_FRAMES_MAX`].
    pub kernel_frames: u16,
    /// Process (thread group) id in the initial pid namespace.
    pub tgid: u32,
    /// Thread id in the initial pid namespace.
    pub tid: u32,
    /// When it happened: CLOCK_BOOTTIME, in nanoseconds.
    pub time_ns: u64,
}

/// A sample: this header, `user_frames` [`Frame`]s, then `kernel_frames` raw kernel addresses (instruction pointer
/// first, then return addresses as they lay on the stack).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleHeader {
    /// Kind, counts, task, time.
    pub head: RecordHead,
    /// What the sample stands for: the sampling period in nanoseconds for [`RecordKind::CpuSample`], in page faults for
    /// [`RecordKind::PageFault`].
    pub value: u64,
    /// Id of the task's cgroup (the inode number of its directory): in the v2 hierarchy, or where that is not mounted in
    /// the v1 hierarchy of [`crate::config::CgroupFacts`].
    pub cgroup_id: u64,
    /// Start of the process on CLOCK_BOOTTIME, in nanoseconds; 0 when the kernel's BTF does not say.
    pub start_ns: u64,
    /// Name of the thread, NUL-terminated.
    pub thread_name: [u8; COMM_BYTES],
    /// Name of the process (of its main thread), NUL-terminated; empty when the kernel's BTF does not say.
    pub comm: [u8; COMM_BYTES],
}

/// What a [`RecordKind::PageFault`] has between its header and its frames.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultPart {
    /// The address that was touched.
    pub address: u64,
}

/// Words of a [`FaultPart`].
pub const FAULT_PART_WORDS: usize = size_of::<FaultPart>() / 8;

/// A change to a process.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessRecord {
    /// Kind, task, time.
    pub head: RecordHead,
    /// Start of the process, as in [`SampleHeader::start_ns`].
    pub start_ns: u64,
    /// As in [`SampleHeader::cgroup_id`].
    pub cgroup_id: u64,
    /// [`RecordKind::Fork`]: id of the process that forked it; 0 in other records.
    pub parent: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// A new cgroup of the hierarchy whose ids samples carry.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupRecord {
    /// Kind and time; the task is the one that made it.
    pub head: RecordHead,
    /// Its id, as in [`SampleHeader::cgroup_id`].
    pub cgroup_id: u64,
}

/// Room for one sample, as the programs build it before it is copied to the ring buffer.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SampleBuffer {
    /// The header.
    pub header: SampleHeader,
    /// User frames, then kernel frames directly behind the last one in use.
    pub frames: [u64; FRAMES_MAX],
}

/// Frames of one sample, of both kinds.
pub const FRAMES_MAX: usize = USER_FRAMES_MAX + KERNEL_FRAMES_MAX;

/// Bytes of the largest record.
pub const RECORD_BYTES_MAX: usize = size_of::<SampleBuffer>();

const _: () = assert!(size_of::<RecordHead>() == 24);
const _: () = assert!(size_of::<SampleHeader>() == 80);
const _: () = assert!(size_of::<ProcessRecord>() == 48);
const _: () = assert!(size_of::<CgroupRecord>() == 32);
const _: () = assert!(RECORD_BYTES_MAX == 80 + 8 * FRAMES_MAX);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_return_address_is_looked_up_inside_its_call() {
        let frame = Frame::raw(0x5555_0000_1000, true);
        assert_eq!((frame.address(), frame.is_return_address()), (0x5555_0000_0fff, true));
        assert_eq!(frame.executable(), None);
    }

    #[test]
    fn an_instruction_pointer_is_looked_up_as_it_is() {
        let frame = Frame::raw(0x5555_0000_1000, false);
        assert_eq!((frame.address(), frame.is_return_address()), (0x5555_0000_1000, false));
    }

    #[test]
    fn a_frame_in_an_executable_keeps_both_parts() {
        let frame = Frame((7 << Frame::EXECUTABLE_SHIFT) | 0x12_3456 | Frame::RETURN_ADDRESS);
        assert_eq!((frame.executable(), frame.address()), (Some(7), 0x12_3456));
    }

    #[test]
    fn every_stack_end_decodes_to_itself() {
        for end in StackEnd::ALL {
            assert_eq!(StackEnd::decode(end as u8), Some(end));
        }
        assert_eq!(StackEnd::decode(0), None);
        assert_eq!(StackEnd::decode(255), None);
    }
}
