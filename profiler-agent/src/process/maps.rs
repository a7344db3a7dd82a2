//! `/proc/<pid>/maps`: the executable ranges of a process.

use crate::addr::{Addr, FileOffset};

/// One executable range. Source: proc_pid_maps(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MapsEntry<'a> {
    /// First address.
    pub(crate) start: Addr,
    /// First address behind the range.
    pub(crate) end: Addr,
    /// Where in the file the range starts.
    pub(crate) offset: FileOffset,
    /// Device of the file, major and minor; 0:0 for memory without one.
    pub(crate) device: (u32, u32),
    /// Inode of the file; 0 for memory without one.
    pub(crate) inode: u64,
    /// Path as the process sees it, with ` (deleted)` as the kernel appends it; `[vdso]` and the like; empty for unnamed memory.
    pub(crate) path: &'a [u8],
}

/// Reads the executable ranges, in the order of the file, which is ascending. Lines that are not as documented are left out.
pub(crate) fn executable_ranges(maps: &[u8]) -> impl Iterator<Item = MapsEntry<'_>> {
    maps.split(|&byte| byte == b'\n').filter_map(parse_line)
}

/// `7f2c-7f2d r-xp 00001000 08:01 1234    /usr/lib/x.so`
fn parse_line(line: &[u8]) -> Option<MapsEntry<'_>> {
    let (range, rest) = split_field(line);
    let (permissions, rest) = split_field(rest);
    if permissions.get(2) != Some(&b'x') {
        return None;
    }
    let (offset, rest) = split_field(rest);
    let (device, rest) = split_field(rest);
    let (inode, rest) = split_field(rest);
    let (start, end) = split_at_byte(range, b'-')?;
    let (major, minor) = split_at_byte(device, b':')?;
    Some(MapsEntry {
        start: Addr(hex(start)?),
        end: Addr(hex(end)?),
        offset: FileOffset(hex(offset)?),
        device: (u32::try_from(hex(major)?).ok()?, u32::try_from(hex(minor)?).ok()?),
        inode: std::str::from_utf8(inode).ok()?.parse().ok()?,
        path: rest.trim_ascii_start(),
    })
}

/// The text before the first space, and what is behind it.
fn split_field(text: &[u8]) -> (&[u8], &[u8]) {
    split_at_byte(text, b' ').unwrap_or((text, &[]))
}

fn split_at_byte(text: &[u8], byte: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|&here| here == byte)?;
    Some((text.get(..at)?, text.get(at + 1..)?))
}

fn hex(text: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(text).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAPS: &[u8] = b"\
55d0a8c00000-55d0a8c01000 r--p 00000000 fe:00 1311 /usr/bin/x y\n\
55d0a8c01000-55d0a8c02000 r-xp 00001000 fe:00 1311                       /usr/bin/x y (deleted)\n\
7f0000000000-7f0000001000 rwxp 00000000 00:00 0 \n\
7ffc3a1fe000-7ffc3a200000 r-xp 00000000 00:00 0                          [vdso]\n";

    #[test]
    fn only_executable_ranges_are_given_with_their_whole_path() {
        let entries: Vec<_> = executable_ranges(MAPS).collect();
        assert_eq!(entries.len(), 3);
        assert_eq!(
            entries[0],
            MapsEntry {
                start: Addr(0x55d0_a8c0_1000),
                end: Addr(0x55d0_a8c0_2000),
                offset: FileOffset(0x1000),
                device: (0xfe, 0),
                inode: 1311,
                path: b"/usr/bin/x y (deleted)",
            }
        );
        assert_eq!(entries[1].path, b"");
        assert_eq!(entries[2].path, b"[vdso]");
    }

    #[test]
    fn this_process_has_executable_ranges() {
        let maps = std::fs::read("/proc/self/maps").expect("own maps");
        assert!(executable_ranges(&maps).any(|entry| entry.path.ends_with(b"[vdso]")));
        assert!(executable_ranges(&maps).is_sorted_by_key(|entry| entry.start));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            executable_ranges(&bytes).count();
        }
    }
}
