//! Names of one executable's addresses, as they are kept on disk.
//!
//! ```text
//! "profnam" 0 | format u32 | key, 32 bytes | SHA-256 of the rest | zstd: prost message
//! ```

use std::collections::HashMap;

use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::NewFrame;
use crate::executable::{ContentHash, Identity};

const MAGIC: &[u8; 8] = b"profnam\0";

/// Other formats are discarded: what is in a file can be had again.
const FORMAT: u32 = 1;

/// Addresses of one executable. Those of a large program under load are about 20,000 in a day.
const ADDRESSES_MAX: usize = 64 << 10;

/// Bytes of a file, and of what it unfolds to.
pub(super) const FILE_BYTES_MAX: u64 = 8 << 20;
const BODY_BYTES_MAX: usize = 32 << 20;

/// Level 3 of zstd: names shrink to a fifth.
const ZSTD_LEVEL: i32 = 3;

/// What names depend on: the executable's content, the file with its debug information, and this program's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NamesKey([u8; 32]);

impl NamesKey {
    /// `content_hash` is of all bytes. `debug_file` tells the versions of the separate file with debug information apart; empty when there is none.
    pub(super) fn new(identity: &Identity, content_hash: ContentHash, debug_file: &str) -> Self {
        let Identity { build_ids, file_bytes, content_hash: _, file: _ } = identity;
        let id = |id: &Option<_>| id.as_ref().map(ToString::to_string).unwrap_or_default();
        let version = env!("CARGO_PKG_VERSION");
        let text =
            format!("{version}\0{}\0{}\0{file_bytes}\0{debug_file}\0", id(&build_ids.gnu), id(&build_ids.go));
        Self(Sha256::new().chain_update(text).chain_update(content_hash).finalize().into())
    }

    /// The name of its file.
    pub(super) fn file_name(&self) -> String {
        let Self(bytes) = self;
        bytes.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Why a file is discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NamesError {
    #[error("not a file of names in the format of this version")]
    Format,
    #[error("names of another executable")]
    Key,
    #[error("damaged")]
    Damaged,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Body {
    #[prost(string, repeated, tag = "1")]
    strings: Vec<String>,
    #[prost(message, repeated, tag = "2")]
    locations: Vec<Location>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Location {
    #[prost(uint64, tag = "1")]
    addr: u64,
    #[prost(message, repeated, tag = "2")]
    frames: Vec<Frame>,
}

/// Strings by their index.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
struct Frame {
    #[prost(uint32, tag = "1")]
    function: u32,
    #[prost(uint32, tag = "2")]
    system_name: u32,
    #[prost(uint32, tag = "3")]
    file: u32,
    #[prost(uint32, tag = "4")]
    line: u32,
    #[prost(uint32, tag = "5")]
    start_line: u32,
}

/// Names by address, innermost frame first, each string once.
#[derive(Debug, Default)]
pub(super) struct Names {
    strings: Vec<Box<str>>,
    /// Made with the first insertion: most files are only read.
    by_text: HashMap<Box<str>, u32>,
    by_addr: HashMap<u64, Box<[Frame]>>,
}

impl Names {
    pub(super) fn get(&self, addr: u64) -> Option<Vec<NewFrame>> {
        let text =
            |index: u32| self.strings.get(index as usize).map(|text| text.to_string()).unwrap_or_default();
        let frames = self.by_addr.get(&addr)?.iter().map(|frame| NewFrame {
            function: text(frame.function),
            system_name: text(frame.system_name),
            file: text(frame.file),
            line: frame.line,
            start_line: frame.start_line,
            ..NewFrame::default()
        });
        Some(frames.collect())
    }

    /// Remembers the frames at an address; false when there is no room.
    pub(super) fn insert(&mut self, addr: u64, frames: &[NewFrame]) -> bool {
        if self.by_addr.len() >= ADDRESSES_MAX {
            return false;
        }
        let frames = frames
            .iter()
            .map(|frame| Frame {
                function: self.intern(&frame.function),
                system_name: self.intern(&frame.system_name),
                file: self.intern(&frame.file),
                line: frame.line,
                start_line: frame.start_line,
            })
            .collect();
        self.by_addr.insert(addr, frames);
        true
    }

    fn intern(&mut self, text: &str) -> u32 {
        if self.by_text.is_empty() {
            self.by_text = (0..).zip(&self.strings).map(|(index, text)| (text.clone(), index)).collect();
        }
        if let Some(&known) = self.by_text.get(text) {
            return known;
        }
        let index = u32::try_from(self.strings.len()).expect("bounded by the number of addresses and frames");
        self.strings.push(text.into());
        self.by_text.insert(text.into(), index);
        index
    }

    /// The bytes of a file.
    pub(super) fn encode(&self, key: NamesKey) -> std::io::Result<Vec<u8>> {
        let strings = self.strings.iter().map(ToString::to_string).collect();
        let locations = self.by_addr.iter().map(|(&addr, frames)| Location { addr, frames: frames.to_vec() });
        let mut locations: Vec<_> = locations.collect();
        locations.sort_unstable_by_key(|location| location.addr);
        let body = zstd::bulk::compress(&Body { strings, locations }.encode_to_vec(), ZSTD_LEVEL)?;
        let sum: [u8; 32] = Sha256::digest(&body).into();
        Ok([&MAGIC[..], &FORMAT.to_le_bytes(), &key.0, &sum, &body].concat())
    }

    /// Reads a file's bytes, which must be for this key and whole.
    pub(super) fn decode(bytes: &[u8], key: NamesKey) -> Result<Self, NamesError> {
        let (magic, rest) = bytes.split_first_chunk::<8>().ok_or(NamesError::Format)?;
        let (format, rest) = rest.split_first_chunk::<4>().ok_or(NamesError::Format)?;
        if magic != MAGIC || u32::from_le_bytes(*format) != FORMAT {
            return Err(NamesError::Format);
        }
        let (found, rest) = rest.split_first_chunk::<32>().ok_or(NamesError::Damaged)?;
        if *found != key.0 {
            return Err(NamesError::Key);
        }
        let (sum, body) = rest.split_first_chunk::<32>().ok_or(NamesError::Damaged)?;
        if *sum != <[u8; 32]>::from(Sha256::digest(body)) {
            return Err(NamesError::Damaged);
        }
        let body = zstd::bulk::decompress(body, BODY_BYTES_MAX).map_err(|_| NamesError::Damaged)?;
        let Body { strings, locations } = Body::decode(body.as_slice()).map_err(|_| NamesError::Damaged)?;
        let strings = strings.into_iter().map(Into::into).collect();
        let locations = locations.into_iter().take(ADDRESSES_MAX);
        let by_addr = locations.map(|Location { addr, frames }| (addr, frames.into())).collect();
        Ok(Self { strings, by_text: HashMap::new(), by_addr })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::executable::testing::read;

    fn key(debug_file: &str) -> NamesKey {
        let executable = read("/proc/self/exe".as_ref()).unwrap();
        NamesKey::new(executable.identity(), [7; 16], debug_file)
    }

    fn frame(function: &str, line: u32) -> NewFrame {
        NewFrame {
            function: function.into(),
            file: "/a.c".into(),
            line,
            start_line: 1,
            ..NewFrame::default()
        }
    }

    fn names() -> Names {
        let mut names = Names::default();
        assert!(names.insert(7, &[frame("inner", 3), frame("outer", 9)]));
        assert!(names.insert(u64::MAX, &[frame("outer", 10)]));
        names
    }

    #[test]
    fn names_are_the_same_after_a_way_through_a_file() {
        let bytes = names().encode(key("")).unwrap();
        let found = Names::decode(&bytes, key("")).unwrap();
        assert_eq!(found.get(7), Some(vec![frame("inner", 3), frame("outer", 9)]));
        assert_eq!(found.get(u64::MAX), Some(vec![frame("outer", 10)]));
        assert_eq!(found.get(8), None);
    }

    #[test]
    fn a_file_for_another_key_or_format_is_discarded() {
        let bytes = names().encode(key("")).unwrap();
        assert_ne!(key("").file_name(), key("other").file_name());
        assert_eq!(Names::decode(&bytes, key("other")).unwrap_err(), NamesError::Key);
        let mut other = bytes;
        other[8] += 1;
        assert_eq!(Names::decode(&other, key("")).unwrap_err(), NamesError::Format);
    }

    #[test]
    fn addresses_are_bounded() {
        let mut names = Names::default();
        let taken =
            (0..ADDRESSES_MAX as u64 + 3).filter(|&addr| names.insert(addr, &[frame("f", 1)])).count();
        assert_eq!(taken, ADDRESSES_MAX);
    }

    proptest! {
        #[test]
        fn a_damaged_file_is_discarded(at in any::<prop::sample::Index>(), with in 1..=u8::MAX, cut in any::<bool>()) {
            let mut bytes = names().encode(key("")).unwrap();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] ^= with }
            prop_assert!(Names::decode(&bytes, key("")).is_err());
        }
    }
}
