//! Uprobes as perf events: one for each function, for kernels without uprobe links.
//!
//! Source: kernel/events/core.c: perf_uprobe; `Documentation/ABI/testing/sysfs-bus-event_source-devices-format`.

use std::{
    fs, io,
    os::fd::{FromRawFd as _, OwnedFd},
    path::Path,
};

/// `perf_event_attr` up to the fields used here. Source: include/uapi/linux/perf_event.h, PERF_ATTR_SIZE_VER1.
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
    wakeup_events: u32,
    bp_type: u32,
    uprobe_path: u64,
    probe_offset: u64,
}

const _: () = assert!(size_of::<Attr>() == 72, "PERF_ATTR_SIZE_VER1");

const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;

/// The kernel's source of uprobe events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UprobeEvents {
    kind: u32,
    /// Bit of `config` that asks for the return.
    return_bit: u64,
}

impl UprobeEvents {
    /// Asks sysfs.
    ///
    /// # Errors
    /// Where it cannot be read, or says what is not understood: before kernel 4.17 there is none.
    pub(crate) fn find(sys_root: &Path) -> io::Result<Self> {
        let directory = sys_root.join("bus/event_source/devices/uprobe");
        let kind = fs::read_to_string(directory.join("type"))?;
        let format = fs::read_to_string(directory.join("format/retprobe"))?;
        let odd =
            || io::Error::new(io::ErrorKind::InvalidData, "the kernel's uprobe events are not understood");
        let bit: u32 =
            format.trim().strip_prefix("config:").and_then(|bit| bit.parse().ok()).ok_or_else(odd)?;
        let return_bit = 1u64.checked_shl(bit).ok_or_else(odd)?;
        Ok(Self { kind: kind.trim().parse().map_err(|_| odd())?, return_bit })
    }

    /// Puts a breakpoint into one process, all of its threads. Closing the event takes it out.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn open(self, file: &Path, pid: u32, offset: u64, is_return: bool) -> io::Result<OwnedFd> {
        let path = std::ffi::CString::new(file.as_os_str().as_encoded_bytes())?;
        let attr = Attr {
            kind: self.kind,
            size: size_of::<Attr>() as u32,
            config: if is_return { self.return_bit } else { 0 },
            uprobe_path: path.as_ptr() as u64,
            probe_offset: offset,
            ..Attr::default()
        };
        // SAFETY: `attr` is a valid perf_event_attr of the size it states, its pointer one to a path with its NUL; the kernel
        // copies both.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attr,
                pid.cast_signed(),
                -1 as libc::c_int,
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysfs(kind: &str, format: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a temporary directory");
        let directory = root.path().join("bus/event_source/devices/uprobe");
        fs::create_dir_all(directory.join("format")).expect("create");
        fs::write(directory.join("type"), kind).expect("write");
        fs::write(directory.join("format/retprobe"), format).expect("write");
        root
    }

    #[test]
    fn sysfs_says_what_the_events_are() {
        let root = sysfs("9\n", "config:0\n");
        let events = UprobeEvents::find(root.path()).expect("they are there");
        assert_eq!(events, UprobeEvents { kind: 9, return_bit: 1 });
    }

    #[test]
    fn what_sysfs_does_not_say_is_an_error() {
        for (kind, format) in [("x", "config:0"), ("9", "config1:0"), ("9", "config:64")] {
            let root = sysfs(kind, format);
            UprobeEvents::find(root.path()).expect_err(format);
        }
        UprobeEvents::find("/nowhere".as_ref()).expect_err("no sysfs");
    }
}
