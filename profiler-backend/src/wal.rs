//! The write-ahead log: pushes that are acknowledged but not yet in a part.
//!
//! One file a segment, `<sequence, 16 hex digits>.wal`:
//! ```text
//! header  8 bytes  "PRFWAL" u16 format version, little endian
//! record  u32 length of the payload | u32 CRC-32 of the payload | payload
//! ```
//! A segment is appended to by one process only and never after that process died: a restart opens a new one. What a
//! crash tore is therefore always at the end of a segment, and reading stops there.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use flate2::Crc;

use crate::private;

const MAGIC: &[u8; 6] = b"PRFWAL";
/// Version of the layout above; a reader refuses any other.
const FORMAT_VERSION: u16 = 1;
const HEADER_BYTES: u64 = 8;
const RECORD_HEADER_BYTES: usize = 8;
/// Longest payload, in bytes: an encoded push with its prefix. A longer length can only be damage.
pub(crate) const RECORD_BYTES_MAX: usize = 80 << 20;

/// What went wrong with the log on disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WalError {
    #[error("{operation} {path}")]
    Io {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("record of {bytes} bytes, more than {RECORD_BYTES_MAX}")]
    RecordTooLarge { bytes: usize },
    #[error("{path}: format version {found}, this program reads {FORMAT_VERSION}")]
    Version { path: PathBuf, found: u16 },
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> WalError {
    let path = path.to_owned();
    move |source| WalError::Io { operation, path, source }
}

/// The segment that is being written.
#[derive(Debug)]
pub(crate) struct Segment {
    file: File,
    path: PathBuf,
    sequence: u64,
    /// Length up to which every record is whole. A failed write is cut back to it.
    bytes: u64,
    broken: bool,
}

impl Segment {
    /// Creates the segment `sequence` in `directory`, durably: header and directory entry are synced.
    pub(crate) fn create(directory: &Path, sequence: u64) -> Result<Self, WalError> {
        let path = directory.join(file_name(sequence));
        let mut file =
            private::file_options().create_new(true).open(&path).map_err(io_error("create", &path))?;
        let mut header = MAGIC.to_vec();
        header.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        let created = file
            .write_all(&header)
            .and_then(|()| file.sync_all())
            .and_then(|()| File::open(directory)?.sync_all());
        if let Err(source) = created {
            // Left behind, its name would block the next attempt at the same sequence.
            let _ = fs::remove_file(&path);
            return Err(io_error("create", &path)(source));
        }
        Ok(Self { file, path, sequence, bytes: HEADER_BYTES, broken: false })
    }

    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Appends records; they are durable only after [`Segment::sync`]. On an error the file is cut back to what it
    /// held before, so that later records do not follow half a one.
    pub(crate) fn append(&mut self, payloads: &[&[u8]]) -> Result<(), WalError> {
        let mut buffer = Vec::with_capacity(payloads.iter().map(|p| p.len() + RECORD_HEADER_BYTES).sum());
        for payload in payloads {
            push_record(&mut buffer, payload)?;
        }
        if let Err(source) = self.file.write_all(&buffer) {
            self.cut_back();
            return Err(io_error("write", &self.path)(source));
        }
        self.bytes += buffer.len() as u64;
        Ok(())
    }

    fn cut_back(&mut self) {
        let cut = self.file.set_len(self.bytes).and_then(|()| self.file.seek(SeekFrom::Start(self.bytes)));
        self.broken |= cut.is_err();
    }

    /// Returns once everything appended is on stable storage. After a failure nobody knows what the file holds.
    pub(crate) fn sync(&mut self) -> Result<(), WalError> {
        self.file.sync_data().inspect_err(|_| self.broken = true).map_err(io_error("sync", &self.path))
    }

    /// Whether nothing more may be appended: what follows might not be found by a replay.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }
}

fn push_record(buffer: &mut Vec<u8>, payload: &[u8]) -> Result<(), WalError> {
    let length = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= RECORD_BYTES_MAX);
    let length = length.ok_or(WalError::RecordTooLarge { bytes: payload.len() })?;
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(&checksum(payload).to_le_bytes());
    buffer.extend_from_slice(payload);
    Ok(())
}

fn checksum(payload: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(payload);
    crc.sum()
}

fn file_name(sequence: u64) -> String {
    format!("{sequence:016x}.wal")
}

/// Sequences of the segments in `directory`, ascending; files with other names are ignored.
pub(crate) fn segments(directory: &Path) -> Result<Vec<u64>, WalError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(io_error("list", directory))? {
        let name = entry.map_err(io_error("list", directory))?.file_name();
        let sequence = name
            .to_str()
            .and_then(|name| name.strip_suffix(".wal"))
            .and_then(|digits| u64::from_str_radix(digits, 16).ok());
        found.extend(sequence);
    }
    found.sort_unstable();
    Ok(found)
}

/// Deletes the segment `sequence`; one that is already gone is no error.
pub(crate) fn remove(directory: &Path, sequence: u64) -> Result<(), WalError> {
    let path = directory.join(file_name(sequence));
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path)(error)),
        _ => Ok(()),
    }
}

/// What reading one segment gave.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Replayed {
    pub(crate) records: u64,
    /// Bytes at the end that are not a whole record: the tail of a write that a crash cut short.
    pub(crate) torn_bytes: u64,
}

/// Hands every whole record of a segment to `take`, oldest first, and stops at the first that is not whole.
pub(crate) fn replay(
    directory: &Path,
    sequence: u64,
    mut take: impl FnMut(Vec<u8>),
) -> Result<Replayed, WalError> {
    let path = directory.join(file_name(sequence));
    let mut file = File::open(&path).map_err(io_error("open", &path))?;
    let length = file.metadata().map_err(io_error("stat", &path))?.len();
    let mut replayed = Replayed::default();
    let mut whole = 0;
    if let Some(version) = read_header(&mut file).map_err(io_error("read", &path))? {
        if version != FORMAT_VERSION {
            return Err(WalError::Version { path, found: version });
        }
        whole = HEADER_BYTES;
        let mut file = io::BufReader::new(file);
        while let Some(payload) = read_record(&mut file, length - whole).map_err(io_error("read", &path))? {
            whole += (RECORD_HEADER_BYTES + payload.len()) as u64;
            replayed.records += 1;
            take(payload);
        }
    }
    replayed.torn_bytes = length.saturating_sub(whole);
    Ok(replayed)
}

/// The format version, or `None` when the header is not whole.
fn read_header(file: &mut File) -> io::Result<Option<u16>> {
    let mut header = [0; HEADER_BYTES as usize];
    if !read_whole(file, &mut header)? {
        return Ok(None);
    }
    let [magic @ .., low, high] = header;
    Ok((magic == *MAGIC).then_some(u16::from_le_bytes([low, high])))
}

/// The next payload, or `None` at the end and at the first record that is cut off or damaged.
fn read_record(reader: &mut impl Read, remaining: u64) -> io::Result<Option<Vec<u8>>> {
    let (mut length, mut expected) = ([0; 4], [0; 4]);
    if !read_whole(reader, &mut length)? || !read_whole(reader, &mut expected)? {
        return Ok(None);
    }
    let length = u32::from_le_bytes(length) as usize;
    // Checked before allocating: a damaged length must not ask for gigabytes.
    if length > RECORD_BYTES_MAX || length as u64 > remaining {
        return Ok(None);
    }
    let mut payload = vec![0; length];
    let whole = read_whole(reader, &mut payload)? && checksum(&payload) == u32::from_le_bytes(expected);
    Ok(whole.then_some(payload))
}

/// Fills `buffer`; `false` when the input ends before it is full.
fn read_whole(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match reader.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use std::fs::OpenOptions;

    use super::*;

    fn write_segment(directory: &Path, sequence: u64, payloads: &[Vec<u8>]) -> PathBuf {
        let mut segment = Segment::create(directory, sequence).expect("create");
        for payload in payloads {
            segment.append(&[payload]).expect("append");
        }
        segment.sync().expect("sync");
        directory.join(file_name(sequence))
    }

    fn read_segment(directory: &Path, sequence: u64) -> (Vec<Vec<u8>>, Replayed) {
        let mut payloads = Vec::new();
        let replayed = replay(directory, sequence, |payload| payloads.push(payload)).expect("replay");
        (payloads, replayed)
    }

    #[test]
    fn records_come_back_in_order() {
        let directory = tempfile::tempdir().expect("tempdir");
        let payloads = vec![b"first".to_vec(), Vec::new(), vec![7; 100_000]];
        write_segment(directory.path(), 3, &payloads);
        assert_eq!(segments(directory.path()).expect("list"), [3]);
        assert_eq!(read_segment(directory.path(), 3), (payloads, Replayed { records: 3, torn_bytes: 0 }));
    }

    #[test]
    fn a_damaged_record_ends_the_segment() {
        let directory = tempfile::tempdir().expect("tempdir");
        let path =
            write_segment(directory.path(), 1, &[b"good".to_vec(), b"bad".to_vec(), b"after".to_vec()]);
        let mut bytes = fs::read(&path).expect("read");
        let bad = bytes.windows(3).position(|window| window == b"bad").expect("written");
        bytes[bad] ^= 1;
        fs::write(&path, bytes).expect("write");
        let (payloads, replayed) = read_segment(directory.path(), 1);
        assert_eq!(payloads, [b"good".to_vec()]);
        assert_eq!(replayed.torn_bytes, 8 + 3 + 8 + 5);
    }

    #[test]
    fn a_damaged_length_does_not_allocate() {
        let directory = tempfile::tempdir().expect("tempdir");
        let path = write_segment(directory.path(), 1, &[b"good".to_vec()]);
        let mut file = OpenOptions::new().append(true).open(path).expect("open");
        file.write_all(&[0xff; 8]).expect("write");
        assert_eq!(read_segment(directory.path(), 1).1, Replayed { records: 1, torn_bytes: 8 });
    }

    #[test]
    fn another_format_version_is_refused() {
        let directory = tempfile::tempdir().expect("tempdir");
        let path = write_segment(directory.path(), 1, &[]);
        fs::write(path, b"PRFWAL\x02\x00").expect("write");
        let error = replay(directory.path(), 1, drop).expect_err("version 2");
        assert!(matches!(error, WalError::Version { found: 2, .. }), "{error}");
    }

    #[test]
    fn removing_twice_is_no_error() {
        let directory = tempfile::tempdir().expect("tempdir");
        write_segment(directory.path(), 9, &[]);
        remove(directory.path(), 9).expect("remove");
        remove(directory.path(), 9).expect("remove again");
        assert!(segments(directory.path()).expect("list").is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_truncation_replays_a_prefix(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..8),
            cut in 0.0..=1.0f64,
        ) {
            let directory = tempfile::tempdir().expect("tempdir");
            let path = write_segment(directory.path(), 1, &payloads);
            let length = fs::metadata(&path).expect("stat").len();
            let kept = (length as f64 * cut) as u64;
            OpenOptions::new().write(true).open(&path).expect("open").set_len(kept).expect("truncate");
            let (read, replayed) = read_segment(directory.path(), 1);
            prop_assert_eq!(&read[..], &payloads[..read.len()]);
            let whole: usize = read.iter().map(|payload| payload.len() + RECORD_HEADER_BYTES).sum();
            let header = if kept >= HEADER_BYTES { HEADER_BYTES } else { 0 };
            prop_assert_eq!(replayed.torn_bytes, kept - header - whole as u64);
            if kept == length {
                prop_assert_eq!(read.len(), payloads.len());
            }
        }
    }
}
