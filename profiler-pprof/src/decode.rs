//! Bytes to profile, for bytes nobody vouches for.

use std::borrow::Cow;
use std::io::{self, Read as _};

use flate2::bufread::MultiGzDecoder;
use prost::Message as _;

use crate::proto::Profile;
use crate::wire;

/// RFC 1952 §2.3.1: ID1, ID2.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// How much one profile may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Bytes of protobuf, after inflating.
    pub inflated_bytes_max: usize,
    /// Bytes of memory of the decoded profile's entries. Lists may keep as much again in reserve.
    pub decoded_bytes_max: usize,
}

impl Default for DecodeLimits {
    /// 64 MiB of protobuf, which is 100 000 stacks of 64 frames with all their symbols and room to spare, and
    /// 512 MiB in memory: a number of one byte takes eight.
    fn default() -> Self {
        Self { inflated_bytes_max: 64 << 20, decoded_bytes_max: 512 << 20 }
    }
}

/// Why bytes are not a profile.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// There is nothing to decode.
    #[error("the profile is empty")]
    Empty,
    /// The gzip stream is broken or cut.
    #[error("inflate the profile")]
    Inflate(#[source] io::Error),
    /// The profile is larger than the reader is willing to hold.
    #[error("the profile is larger than {max} bytes")]
    TooLarge {
        /// [`DecodeLimits::inflated_bytes_max`].
        max: usize,
    },
    /// The profile has more entries than the reader is willing to hold.
    #[error("the profile takes {bytes} bytes of memory, more than {max}")]
    TooManyEntries {
        /// What its entries would take.
        bytes: usize,
        /// [`DecodeLimits::decoded_bytes_max`].
        max: usize,
    },
    /// The protobuf is broken, cut, or holds a string that is not UTF-8.
    #[error("decode the profile")]
    Protobuf(#[source] prost::DecodeError),
}

/// Reads a profile from plain or gzipped protobuf; gzip is recognized by its first two bytes.
///
/// Fields that profile.proto does not name are skipped. Nothing relates the tables to each other yet: that is
/// [`crate::check()`].
///
/// # Errors
/// Never panics and never holds more than `limits` allow, whatever the bytes are.
pub fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<Profile, DecodeError> {
    let protobuf = inflate(bytes, limits)?;
    if protobuf.is_empty() {
        return Err(DecodeError::Empty);
    }
    let (bytes, max) = (wire::profile_footprint(&protobuf), limits.decoded_bytes_max);
    if bytes > max {
        return Err(DecodeError::TooManyEntries { bytes, max });
    }
    Profile::decode(&*protobuf).map_err(DecodeError::Protobuf)
}

fn inflate<'a>(bytes: &'a [u8], limits: &DecodeLimits) -> Result<Cow<'a, [u8]>, DecodeError> {
    let max = limits.inflated_bytes_max;
    let protobuf = if bytes.starts_with(&GZIP_MAGIC) {
        // One byte more than allowed tells "exactly full" from "too large".
        let bound = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
        let mut inflated = Vec::new();
        MultiGzDecoder::new(bytes).take(bound).read_to_end(&mut inflated).map_err(DecodeError::Inflate)?;
        Cow::Owned(inflated)
    } else {
        Cow::Borrowed(bytes)
    };
    if protobuf.len() > max { Err(DecodeError::TooLarge { max }) } else { Ok(protobuf) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{encode, encode_gzip};

    fn profile() -> Profile {
        Profile {
            string_table: ["", "cpu", "nanoseconds"].map(str::to_owned).to_vec(),
            duration_nanos: 10_000_000_000,
            ..Default::default()
        }
    }

    fn limits(inflated_bytes_max: usize) -> DecodeLimits {
        DecodeLimits { inflated_bytes_max, ..DecodeLimits::default() }
    }

    #[track_caller]
    fn check(bytes: &[u8], limits: DecodeLimits, expect: &str) {
        let error = decode(bytes, &limits).expect_err("must be refused");
        assert_eq!(error.to_string(), expect);
    }

    #[test]
    fn plain_and_gzipped_bytes_give_the_same_profile() {
        let default = DecodeLimits::default();
        assert_eq!(decode(&encode(&profile()), &default).unwrap(), profile());
        assert_eq!(decode(&encode_gzip(&profile()), &default).unwrap(), profile());
    }

    #[test]
    fn a_gzip_stream_of_two_members_is_read_to_its_end() {
        let protobuf = encode(&profile());
        let (head, tail) = protobuf.split_at(7);
        let member = |bytes: &[u8]| {
            let mut inflated = Vec::new();
            flate2::bufread::GzEncoder::new(bytes, flate2::Compression::fast())
                .read_to_end(&mut inflated)
                .unwrap();
            inflated
        };
        let gzip = [member(head), member(tail)].concat();
        assert_eq!(decode(&gzip, &DecodeLimits::default()).unwrap(), profile());
    }

    #[test]
    fn the_bound_on_inflated_bytes_is_exact() {
        let len = encode(&profile()).len();
        for bytes in [encode(&profile()), encode_gzip(&profile())] {
            assert!(decode(&bytes, &limits(len)).is_ok());
            check(&bytes, limits(len - 1), &format!("the profile is larger than {} bytes", len - 1));
        }
    }

    #[test]
    fn a_gzip_bomb_is_refused_at_the_bound() {
        let bomb = Profile { string_table: vec!["x".repeat(16 << 20)], ..Default::default() };
        let gzip = encode_gzip(&bomb);
        assert!(gzip.len() < 1 << 20, "{} bytes are no bomb", gzip.len());
        check(&gzip, limits(1 << 20), "the profile is larger than 1048576 bytes");
    }

    #[test]
    fn a_swarm_of_empty_samples_is_refused_before_it_is_built() {
        let swarm = [0x12, 0x00].repeat(1000);
        let limits = DecodeLimits { decoded_bytes_max: 71_999, ..DecodeLimits::default() };
        check(&swarm, limits, "the profile takes 72000 bytes of memory, more than 71999");
    }

    #[test]
    fn broken_bytes_are_an_error() {
        let default = DecodeLimits::default();
        check(b"", default, "the profile is empty");
        check(b"\x1f\x8b", default, "inflate the profile");
        check(b"--- contentionz 1 ---", default, "decode the profile");
        // A string that is not UTF-8.
        check(&[0x32, 0x01, 0xff], default, "decode the profile");
        let gzip = encode_gzip(&profile());
        check(&gzip[..gzip.len() - 1], default, "inflate the profile");
    }
}
