//! Profile to bytes.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message as _;

use crate::proto::Profile;

/// The profile as plain protobuf. Equal profiles give equal bytes.
pub fn encode(profile: &Profile) -> Vec<u8> {
    profile.encode_to_vec()
}

/// The profile as gzipped protobuf, the form profile.proto asks for in files. Equal profiles give equal bytes:
/// the gzip header holds no time and no name.
///
/// The level is the fastest one, as in Go's own profiles (`runtime/pprof`): this runs on the node that is
/// observed.
pub fn encode_gzip(profile: &Profile) -> Vec<u8> {
    const IN_MEMORY: &str = "writing to a Vec cannot fail";
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(&encode(profile)).expect(IN_MEMORY);
    gzip.finish().expect(IN_MEMORY)
}
