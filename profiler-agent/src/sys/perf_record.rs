//! Records that the kernel writes into the ring of a perf event which asks for executable mappings.
//!
//! Names of mapped files are the processes' choice: every length is checked.
//!
//! Source: include/uapi/linux/perf_event.h, enum `perf_event_type`.

/// What a record tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PerfRecord<'a> {
    /// A process has mapped code, or has made mapped memory executable.
    Mapped(Mapped<'a>),
    /// So many records before this one found no room.
    Lost(u64),
    /// Anything else, which was not asked for.
    Other,
}

/// A new executable mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapped<'a> {
    /// Process id.
    pub(crate) pid: u32,
    /// When it was mapped: CLOCK_BOOTTIME, in nanoseconds.
    pub(crate) time_ns: u64,
    /// First address.
    pub(crate) start: u64,
    /// First address behind the range, above `start`.
    pub(crate) end: u64,
    /// Where in the file the range starts, in bytes; 0 for memory without a file.
    pub(crate) offset: u64,
    /// Device of the file, major and minor.
    pub(crate) device: (u32, u32),
    /// Inode of the file; 0 for memory without one.
    pub(crate) inode: u64,
    /// As in `/proc/<pid>/maps`: path of the file, `[vdso]` and the like, empty for unnamed memory.
    pub(crate) path: &'a [u8],
}

/// Bytes of `perf_event_header`, the least that a record has.
pub(crate) const HEADER_BYTES: usize = 8;

const PERF_RECORD_LOST: u32 = 2;
const PERF_RECORD_MMAP2: u32 = 10;
/// The file is told by build id; not asked for.
const PERF_RECORD_MISC_MMAP_BUILD_ID: u16 = 1 << 14;
/// What stands for the name of memory that has none. Source: kernel/events/core.c, perf_event_mmap_event.
const ANONYMOUS: &[u8] = b"//anon";

/// Length of a record, in bytes, from its header; `None` where that is none.
pub(crate) fn length(header: [u8; HEADER_BYTES]) -> Option<usize> {
    let [.., low, high] = header;
    let bytes = usize::from(u16::from_ne_bytes([low, high]));
    (bytes >= HEADER_BYTES).then_some(bytes)
}

/// Reads one record of an event that was opened with `PERF_SAMPLE_TIME` and `sample_id_all`. `None` for what is none.
pub(crate) fn parse(record: &[u8]) -> Option<PerfRecord<'_>> {
    let (header, body) = record.split_first_chunk::<HEADER_BYTES>()?;
    let [kind @ .., misc_low, misc_high, _, _] = *header;
    if length(*header)? != record.len() {
        return None;
    }
    match u32::from_ne_bytes(kind) {
        PERF_RECORD_LOST => {
            let (_id, rest) = u64_of(body)?;
            Some(PerfRecord::Lost(u64_of(rest)?.0))
        }
        PERF_RECORD_MMAP2
            if u16::from_ne_bytes([misc_low, misc_high]) & PERF_RECORD_MISC_MMAP_BUILD_ID == 0 =>
        {
            mapped(body).map(PerfRecord::Mapped)
        }
        _ => Some(PerfRecord::Other),
    }
}

fn mapped(body: &[u8]) -> Option<Mapped<'_>> {
    // Behind the name is what sample_id_all asks for: the time.
    let (body, time_ns) = body.split_last_chunk()?;
    let (pid, rest) = u32_of(body)?;
    let (_tid, rest) = u32_of(rest)?;
    let (start, rest) = u64_of(rest)?;
    let (bytes, rest) = u64_of(rest)?;
    let (offset, rest) = u64_of(rest)?;
    let (major, rest) = u32_of(rest)?;
    let (minor, rest) = u32_of(rest)?;
    let (inode, rest) = u64_of(rest)?;
    let (_inode_generation, rest) = u64_of(rest)?;
    let (_protection, rest) = u32_of(rest)?;
    let (_flags, name) = u32_of(rest)?;
    let path = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let end = start.checked_add(bytes).filter(|&end| end > start)?;
    Some(Mapped {
        pid,
        time_ns: u64::from_ne_bytes(*time_ns),
        start,
        end,
        offset: if inode == 0 { 0 } else { offset },
        device: (major, minor),
        inode,
        path: if path == ANONYMOUS { b"" } else { path },
    })
}

fn u32_of(bytes: &[u8]) -> Option<(u32, &[u8])> {
    bytes.split_first_chunk().map(|(word, rest)| (u32::from_ne_bytes(*word), rest))
}

fn u64_of(bytes: &[u8]) -> Option<(u64, &[u8])> {
    bytes.split_first_chunk().map(|(word, rest)| (u64::from_ne_bytes(*word), rest))
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A record of a kind with this body, as the kernel writes it.
    pub(crate) fn record(kind: u32, misc: u16, body: &[u8]) -> Vec<u8> {
        let bytes = u16::try_from(HEADER_BYTES + body.len()).expect("tests write short records");
        [&kind.to_ne_bytes()[..], &misc.to_ne_bytes(), &bytes.to_ne_bytes(), body].concat()
    }

    /// The record of a mapping.
    pub(crate) fn encode(mapped: &Mapped<'_>) -> Vec<u8> {
        let &Mapped { pid, time_ns, start, end, offset, device, inode, path } = mapped;
        let mut name = path.to_vec();
        name.resize(path.len() / 8 * 8 + 8, 0);
        let body = [
            &[pid, pid].map(u32::to_ne_bytes).concat()[..],
            &[start, end - start, offset].map(u64::to_ne_bytes).concat(),
            &[device.0, device.1].map(u32::to_ne_bytes).concat(),
            &[inode, 3].map(u64::to_ne_bytes).concat(),
            &[5, 2].map(u32::to_ne_bytes).concat(),
            &name,
            &time_ns.to_ne_bytes(),
        ];
        record(PERF_RECORD_MMAP2, 2, &body.concat())
    }

    const LIBRARY: Mapped<'_> = Mapped {
        pid: 71,
        time_ns: 5,
        start: 0x7f00_0000_1000,
        end: 0x7f00_0000_3000,
        offset: 0x1000,
        device: (8, 1),
        inode: 1234,
        path: b"/usr/lib/x.so",
    };

    #[test]
    fn a_mapping_is_read_as_the_kernel_writes_it() {
        assert_eq!(parse(&encode(&LIBRARY)), Some(PerfRecord::Mapped(LIBRARY)));
        let at_a_multiple_of_8 = Mapped { path: b"/lib/a.so.1.2.3.", ..LIBRARY };
        assert_eq!(parse(&encode(&at_a_multiple_of_8)), Some(PerfRecord::Mapped(at_a_multiple_of_8)));
    }

    #[test]
    fn memory_without_a_file_is_as_proc_has_it() {
        let written = Mapped { inode: 0, device: (0, 0), path: b"//anon", ..LIBRARY };
        let read = Mapped { offset: 0, path: b"", ..written };
        assert_eq!(parse(&encode(&written)), Some(PerfRecord::Mapped(read)));
    }

    #[test]
    fn lost_records_are_told_and_others_are_none_of_ours() {
        let lost = [7u64, 40, 5].map(u64::to_ne_bytes).concat();
        assert_eq!(parse(&record(PERF_RECORD_LOST, 0, &lost)), Some(PerfRecord::Lost(40)));
        assert_eq!(parse(&record(9, 0, &lost)), Some(PerfRecord::Other));
        assert_eq!(parse(&record(PERF_RECORD_LOST, 0, &lost[..12])), None);
    }

    #[test]
    fn truncated_records_and_empty_ranges_are_refused() {
        let whole = encode(&LIBRARY);
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length]), None, "{length} bytes");
        }
        let wraps = Mapped { start: 8, end: 8, ..LIBRARY };
        assert_eq!(parse(&encode(&wraps)), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(
            kind in prop_oneof![Just(PERF_RECORD_LOST), Just(PERF_RECORD_MMAP2), any::<u32>()],
            body in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            if let Some(PerfRecord::Mapped(mapped)) = parse(&record(kind, 0, &body)) {
                prop_assert!(mapped.start < mapped.end);
            }
        }
    }
}
