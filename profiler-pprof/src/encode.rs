//! Profile to bytes.

use flate2::{Compress, Compression, Crc, FlushCompress, Status};
use prost::Message as _;

use crate::proto::Profile;

/// The profile as plain protobuf. Equal profiles give equal bytes.
pub fn encode(profile: &Profile) -> Vec<u8> {
    profile.encode_to_vec()
}

/// The profile as gzipped protobuf, the form profile.proto asks for in files. Equal profiles give equal bytes:
/// the gzip header holds no time and no name.
pub fn encode_gzip(profile: &Profile) -> Vec<u8> {
    Gzip::new().encode(profile)
}

/// [`encode_gzip`] for many profiles: what the compressor needs, 270 KB, is made ready once.
///
/// The level is the fastest one, as in Go's own profiles (`runtime/pprof`): this runs on the node that is
/// observed.
#[derive(Debug)]
pub struct Gzip(Compress);

impl Gzip {
    /// Ready to encode.
    pub fn new() -> Self {
        Self(Compress::new(Compression::fast(), false))
    }

    /// One profile.
    pub fn encode(&mut self, profile: &Profile) -> Vec<u8> {
        // Source: RFC 1952, 2.3: magic, deflate, no flags, no time, fastest, unknown system.
        const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 4, 255];
        const ROOM: usize = 4 << 10;
        let Self(compress) = self;
        compress.reset();
        let bytes = encode(profile);
        let mut gzip = Vec::with_capacity(HEADER.len() + bytes.len() / 2 + ROOM);
        gzip.extend(HEADER);
        loop {
            let rest = usize::try_from(compress.total_in()).ok().and_then(|taken| bytes.get(taken..));
            let status = compress.compress_vec(rest.unwrap_or_default(), &mut gzip, FlushCompress::Finish);
            match status.expect("deflate takes any bytes") {
                Status::StreamEnd => break,
                Status::Ok | Status::BufError => gzip.reserve(ROOM),
            }
        }
        let mut crc = Crc::new();
        crc.update(&bytes);
        gzip.extend(crc.sum().to_le_bytes());
        // Of the length modulo 2^32.
        gzip.extend(crc.amount().to_le_bytes());
        gzip
    }
}

impl Default for Gzip {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use flate2::read::GzDecoder;

    use super::*;

    #[test]
    fn profiles_of_any_size_are_one_gzip_member_each() {
        let mut gzip = Gzip::new();
        for strings in [0, 1, 100_000, 3] {
            let string_table = (0..strings).map(|number: u32| number.wrapping_mul(2_654_435_761).to_string());
            let profile = Profile { string_table: string_table.collect(), ..Profile::default() };
            let bytes = gzip.encode(&profile);
            assert_eq!(bytes, encode_gzip(&profile));
            let mut plain = Vec::new();
            let mut decoder = GzDecoder::new(&*bytes);
            decoder.read_to_end(&mut plain).expect("length and checksum are right");
            assert!(decoder.into_inner().is_empty());
            assert_eq!(plain, encode(&profile));
        }
    }
}
